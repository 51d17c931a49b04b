"""What an engine is made of: chosen for the kernel that serves, and refused where it would end badly."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from serve_app.engine import build
from serve_app.engine.engine import Engine
from serve_app.engine.errors import EngineError
from serve_app.engine.kv_cache import PagePool


@pytest.mark.parametrize(("attention", "in_runs"), [("plain", False), ("sdpa", True)])
def test_pages_are_neighbours_only_for_a_kernel_that_reads_runs(
    make_engine: Callable[..., Engine], attention: str, in_runs: bool
) -> None:
    engine = make_engine(attention=attention)
    assert engine.capacity.attention_backend == attention
    assert engine.capacity.reads_runs == in_runs
    assert type(engine._pool._free) is type(PagePool(1, in_runs=in_runs)._free)


@pytest.mark.parametrize("free_bytes", [None, 17 * 2**20 + build.CPU_STEP_BYTES])
def test_a_cache_for_which_there_is_memory(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, free_bytes: int | None
) -> None:
    monkeypatch.setattr(build, "available_memory_bytes", lambda: free_bytes)
    assert make_engine(kv_cache_memory="16MiB", context=4096).capacity.kv_cache_bytes > 15 * 2**20


def test_a_cache_for_which_there_is_none_is_refused_before_it_is_touched(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "available_memory_bytes", lambda: 2**33)
    monkeypatch.setattr(build, "KVCache", None)
    with pytest.raises(EngineError) as refused:
        make_engine(kv_cache_memory="12GiB", context=2**20)
    assert str(refused.value).startswith("12.0 GiB of KV cache and 0.2 GiB for the computation don't fit into the 8.0")
    assert "lower engine.kv_cache_memory" in str(refused.value)
    assert "\n" not in str(refused.value)
