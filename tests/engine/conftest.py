"""Engines of tiny models that are stopped, and checked for leaks, at the end of each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CONTEXT, FINGERPRINT, tiny_model

from serve_app.config import EngineConfig
from serve_app.engine import build
from serve_app.engine.cpu.library import Kernels, load_kernels
from serve_app.engine.engine import Engine
from serve_app.engine.engine_error import EngineError


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """Engines of tiny models, stopped at the end.

    Keywords are EngineConfig's, `model`, `context`, `dtype`, `kernel_cache`, `before_isolated`, `on_stage`,
    `vocabulary`, and `backends`: attention kernels to try in this order instead of what `attention` says.
    """
    engines: list[Engine] = []

    def make(kind: str = "llama", **settings: Any) -> Engine:
        model = settings.pop("model", None) or tiny_model(kind)
        extras = {
            name: settings.pop(name)
            for name in ("kernel_cache", "before_isolated", "on_stage", "dtype", "vocabulary")
            if name in settings
        }
        context, backends = settings.pop("context", CONTEXT), settings.pop("backends", None)
        config = EngineConfig(**({"kv_cache_memory": "16MiB", "threads": 1} | settings))
        with pytest.MonkeyPatch.context() as patched:
            if backends is not None:
                patched.setattr(build, "_candidates", lambda config, kernels: backends)
            engines.append(Engine(model, config, context_tokens=context, fingerprint=FINGERPRINT, **extras))
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()
        assert engine.stats().used_pages == 0, "pages leaked"


@pytest.fixture(scope="session")
def kernels(kernel_folder: Path) -> Kernels:
    """The compiled CPU kernels; without a C++ compiler the tests of them are skipped."""
    try:
        return load_kernels(kernel_folder)
    except EngineError as error:
        pytest.skip(str(error))
