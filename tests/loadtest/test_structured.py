"""What a schema costs: all kinds of runs run, and the report says whether the targets are met."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_vocabulary import loaded, small_vocabulary
from tiny_models import CONTEXT, FINGERPRINT, tiny_model

from loadtest.structured import Bench, endless, first_tokens, mask_times, report, throughput
from serve_app.config import EngineConfig
from serve_app.engine.engine import Engine


def test_a_bench_compares_the_same_work_with_a_schema_and_without(kernel_folder: Path) -> None:
    config = EngineConfig(kv_cache_memory="16MiB", threads=1, max_running=12, prompt_lookup=False)
    engine = Engine(
        tiny_model("llama"),
        config,
        context_tokens=CONTEXT,
        fingerprint=FINGERPRINT,
        kernel_cache=kernel_folder,
        vocabulary=loaded(),
    )
    try:
        bench = Bench(engine, FINGERPRINT, [[5, 6, 7], [9]])
        found = throughput(bench, streams=3, new_tokens=40, rounds=2)
        first = first_tokens(bench, rounds=2)
        with pytest.raises(SystemExit, match="can't be used"):
            bench.first_token_ms("start: ((")
    finally:
        engine.stop()
    assert found["none"]["ratio"] == found["none"]["cpu_ratio"] == 1
    # The first token of an output comes with its prompt.
    assert found["none"]["tokens_per_step"] == found["masks"]["tokens_per_step"] > 2.5
    assert found["served"]["tokens_per_step"] > 3.5, "names of properties are forced"
    assert min(first.values()) > 0
    masks = mask_times(small_vocabulary(), outputs=2, tokens=20)
    assert masks["median"] <= masks["p99"] <= masks["most"]
    told = report({8: found}, first, masks)
    assert "at least 0.95" in told
    assert f"| 8 | {found['none']['tokens_per_s']:.0f} |" in told


def test_each_name_is_another_grammar() -> None:
    assert endless("a") != endless("b")
    assert len(endless("a")) == len(endless("b"))
