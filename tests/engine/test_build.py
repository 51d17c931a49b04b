"""What an engine is made of: chosen for the kernel that serves, and refused where it would end badly."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from serve_app.engine.engine import Engine
from serve_app.engine.kv_cache import PagePool


@pytest.mark.parametrize(("attention", "in_runs"), [("plain", False), ("sdpa", True)])
def test_pages_are_neighbours_only_for_a_kernel_that_reads_runs(
    make_engine: Callable[..., Engine], attention: str, in_runs: bool
) -> None:
    engine = make_engine(attention=attention)
    assert engine.capacity.attention_backend == attention
    assert engine.capacity.reads_runs == in_runs
    assert type(engine._pool._free) is type(PagePool(1, in_runs=in_runs)._free)
