"""The profile of a step: what it times is what ran, and its table says it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import CONTEXT, FINGERPRINT, VOCAB, tiny_model

from loadtest.profile_step import PARTS, Profile, decode, median, prefill, table
from serve_app.config import EngineConfig
from serve_app.engine.engine import Engine


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def profile(request: pytest.FixtureRequest, kernel_folder: Path) -> Iterator[Profile]:
    model = tiny_model("llama")
    config = EngineConfig(kv_cache_memory="16MiB", threads=1, cpu_kernels=request.param, prompt_lookup=False)
    engine = Engine(model, config, context_tokens=CONTEXT, fingerprint=FINGERPRINT, kernel_cache=kernel_folder)
    yield Profile(engine, SimpleNamespace(model=model, fingerprint=FINGERPRINT), vocabulary=VOCAB)
    engine.stop()


def test_steps_are_told_apart_and_parts_add_up(profile: Profile) -> None:
    steps = profile.run([profile.request(40, 5) for _ in range(3)])
    assert sum(step["prefilled"] for step in steps) == 120
    assert sum(step["decodes"] for step in steps) == 12, "of each output the first token comes with the prefill"
    for step in steps:
        parts = sum(step.get(part, 0.0) for part in PARTS)
        assert 0 < parts <= step["total"]
    assert decode(profile, 2, 6, 0.8)["sampling"] > 0
    assert prefill(profile, 48)["total"] > 0


def test_layers_can_be_taken_apart(profile: Profile) -> None:
    fused = profile.engine._core.sampler._kernels is not None
    assert (decode(profile, 2, 6)["decoder layers"] > 0) is fused
    profile.take_layers_apart()
    apart = decode(profile, 2, 6)
    assert apart["decoder layers"] == 0
    assert (apart["linears"] > 0) is (apart["attention"] > 0) is fused


def test_the_table_says_what_fraction_of_the_wall_is_reached() -> None:
    step = median([{"linears": 8.0, "total": 12.0}, {"linears": 10.0, "total": 20.0}, {"total": 16.0}])
    assert (step["linears"], step["total"]) == (8.0, 16.0)
    text = table(
        {"weight_bytes": 80_000_000, "read_bytes_per_s": 10e9, "cases": {"8 sampled": step, "prefill 64": step}}
    )
    assert "take 8.0 ms" in text
    assert "| reading the weights, of the total | 50% | 50% |" in text
    assert "| tok/s | 500 | 4000 |" in text
    assert "| sampling |" not in text, "a part that took no time"
