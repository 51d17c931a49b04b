"""What an engine is made of: chosen for the kernel that serves, and refused where it would end badly."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve_app.config import AppConfig, EngineConfig, ReplicasConfig
from serve_app.engine import build, kv_budget
from serve_app.engine.attention.base import AttentionParams
from serve_app.engine.attention.plain import PlainAttention
from serve_app.engine.attention.sdpa import SdpaAttention
from serve_app.engine.engine import Engine
from serve_app.engine.engine_error import EngineError, UnsupportedModelError
from serve_app.engine.kv_cache import KVCache, LayerShape, PagePool
from serve_app.engine.load_check import check_model
from serve_app.engine.model_runner import AttentionLayer, ModelRunner
from serve_app.engine.scheduler import Chunk


@pytest.mark.parametrize(("attention", "in_runs"), [("plain", False), ("sdpa", True)])
def test_pages_are_neighbours_only_for_a_kernel_that_reads_runs(
    make_engine: Callable[..., Engine], attention: str, in_runs: bool
) -> None:
    engine = make_engine(attention=attention)
    assert engine.capacity.attention_backend == attention
    assert type(engine._core.scheduler.pool._free) is type(PagePool(1, in_runs=in_runs)._free)


@pytest.mark.parametrize("free_bytes", [None, 17 * 2**20 + kv_budget.CPU_STEP_BYTES])
def test_a_cache_for_which_there_is_memory(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, free_bytes: int | None
) -> None:
    monkeypatch.setattr(kv_budget, "available_memory_bytes", lambda: free_bytes)
    assert make_engine(kv_cache_memory="16MiB", context=4096).capacity.kv_cache_bytes > 15 * 2**20


def test_a_cache_for_which_there_is_none_is_refused_before_it_is_touched(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_budget, "available_memory_bytes", lambda: 2**33)
    monkeypatch.setattr(kv_budget, "KVCache", None)
    with pytest.raises(EngineError) as refused:
        make_engine(kv_cache_memory="12GiB", context=2**20)
    assert str(refused.value).startswith("12.0 GiB of KV cache and 0.2 GiB for the computation don't fit into the 8.0")
    assert "lower engine.kv_cache_memory" in str(refused.value)
    assert "\n" not in str(refused.value)


GIB = 2**30


@pytest.mark.parametrize(
    ("layers", "share_of_first", "share_of_second"),
    [((16, 16), 40, 40), ((17, 15), 38, 42), ((15, 17), 42, 38), ((24, 8), 24, 56), ((32, 0), 8, 72)],
)
@pytest.mark.parametrize("wide_first", [False, True])
def test_no_gpu_is_given_more_of_the_cache_than_its_share(
    monkeypatch: pytest.MonkeyPatch,
    layers: tuple[int, int],
    share_of_first: int,
    share_of_second: int,
    wide_first: bool,
) -> None:
    """Two GPUs of 80 GiB, 32 layers of 2 GiB: what the weights and a tenth left free leave of them is their share."""
    shapes = [
        LayerShape(16 if wide_first and index == 0 else 8, 128, 128, torch.bfloat16, torch.device("cuda", device))
        for index, device in enumerate([0] * layers[0] + [1] * layers[1])
    ]
    runner: Any = SimpleNamespace(
        layers={index: AttentionLayer(shape, 32, AttentionParams(0.1)) for index, shape in enumerate(shapes)},
        peak_bytes=lambda tokens: 0,
        vocab_size=0,
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((80 - 2 * layers[device.index]) * GIB, 80 * GIB))
    config = EngineConfig(gpu_memory_fraction=0.9, cuda_graphs=False)
    budget = kv_budget._gpu_budget(runner, config)
    total = sum(shape.bytes_per_token for shape in shapes)
    filled = []
    for index, share in enumerate((share_of_first, share_of_second)):
        held = sum(shape.bytes_per_token for shape in shapes if shape.device.index == index)
        filled.append(budget * held / total / (share * GIB))
    assert max(filled) == pytest.approx(1.0), "the fullest one decides, and none of its share is left"


@pytest.mark.parametrize("number", [0, 1])
def test_replicas_that_share_a_gpu_each_get_their_part(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Of 80 GiB: each has 10 GiB of weights, and the first one's share is taken when the second one starts."""
    shape = LayerShape(8, 128, 128, torch.bfloat16, torch.device("cuda", 0))
    runner: Any = SimpleNamespace(
        layers={0: AttentionLayer(shape, 32, AttentionParams(0.1))}, peak_bytes=lambda tokens: 0, vocab_size=0
    )
    half = AppConfig(model_server=ReplicasConfig(num_gpus=0.5)).gpu_memory_fraction
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((70 - 36 * number) * GIB, 80 * GIB))
    budget = kv_budget._gpu_budget(runner, EngineConfig(gpu_memory_fraction=half, cuda_graphs=False))
    assert budget == pytest.approx((36 - 10) * GIB, rel=0.1)
    assert budget + 10 * GIB <= 36 * GIB


def test_the_default_share_of_a_gpu_is_that_of_what_is_taken_of_it() -> None:
    def share(num_gpus: float, **engine: Any) -> float:
        return AppConfig(
            engine=EngineConfig(**engine), model_server=ReplicasConfig(num_gpus=num_gpus)
        ).gpu_memory_fraction

    assert [share(number) for number in (0, 0.5, 1, 2)] == [0.9, 0.45, 0.9, 0.9]
    assert share(0.5, gpu_memory_fraction=0.8) == 0.8, "what is said holds"


def test_the_fullest_gpu_may_have_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [LayerShape(8, 128, 128, torch.bfloat16, torch.device("cuda", device)) for device in (0, 1)]
    runner: Any = SimpleNamespace(
        layers={index: AttentionLayer(shape, 32, AttentionParams(0.1)) for index, shape in enumerate(shapes)},
        peak_bytes=lambda tokens: 0,
        vocab_size=0,
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((7 + 60 * device.index) * GIB, 80 * GIB))
    with pytest.raises(EngineError, match="the weights leave no room"):
        kv_budget._gpu_budget(runner, EngineConfig(gpu_memory_fraction=0.9, cuda_graphs=False))


@pytest.fixture
def ten_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of main memory are free for KV caches, less what those take that somebody still holds."""
    caches: weakref.WeakSet[KVCache] = weakref.WeakSet()

    class Counted(KVCache):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            caches.add(self)

    def free() -> int:
        return kv_budget.CPU_STEP_BYTES + 10 * 2**20 - sum(cache.bytes for cache in caches)

    monkeypatch.setattr(kv_budget, "KVCache", Counted)
    monkeypatch.setattr(kv_budget, "available_memory_bytes", free)


def _complain(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    complaints = iter(["its logits differ"] * times)
    monkeypatch.setattr(build, "check_model", lambda *_, **__: next(complaints, None))


@pytest.mark.usefixtures("ten_mib", "kernels")
@pytest.mark.parametrize("own_kernels", [False, True])
def test_why_a_model_is_refused_is_said_though_one_cache_fills_the_memory(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, kernel_folder: Path, own_kernels: bool
) -> None:
    _complain(monkeypatch, 3)
    with pytest.raises(UnsupportedModelError, match="logits differ"):
        make_engine(kernel_cache=kernel_folder if own_kernels else None, kv_cache_memory="8MiB", context=4096)


@pytest.mark.usefixtures("ten_mib", "kernels")
def test_the_next_kernel_serves_though_one_cache_fills_the_memory(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, kernel_folder: Path
) -> None:
    _complain(monkeypatch, 1)
    engine = make_engine(kernel_cache=kernel_folder, kv_cache_memory="8MiB", context=4096)
    assert engine.capacity.attention_backend == "sdpa"
    assert engine.capacity.kv_cache_bytes > 7 * 2**20
    assert "cpu failed its check" in engine.capacity.notes[0]


@pytest.mark.parametrize("pages_like", [PlainAttention, SdpaAttention])
def test_the_model_is_checked_in_a_small_cache_and_served_from_the_large_one(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, pages_like: type[PlainAttention]
) -> None:
    checked: list[int] = []

    def spy(runner: ModelRunner) -> str | None:
        checked.append(runner.cache.num_pages - 1)
        return check_model(runner)

    monkeypatch.setattr(build, "check_model", spy)
    engine = make_engine(backends=[pages_like], context=4096)
    assert checked == [12]
    cache = engine._core.runner.cache
    assert cache.bytes == engine.capacity.kv_cache_bytes > 15 * 2**20
    assert (cache.num_pages - 1) * engine.capacity.page_tokens == engine.capacity.kv_capacity_tokens


@pytest.mark.parametrize("kv_cache_memory", ["64KiB", "100KiB"])
def test_the_check_takes_no_more_than_the_engine_may(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, kv_cache_memory: str
) -> None:
    taken: list[int] = []

    class Noted(KVCache):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            taken.append(self.bytes)

    monkeypatch.setattr(kv_budget, "KVCache", Noted)
    engine = make_engine(kv_cache_memory=kv_cache_memory)
    assert taken == [engine.capacity.kv_cache_bytes] * 2


@pytest.mark.parametrize("page_tokens", [1, 3, 8, 16, 24, 32, 40, 48, 64, 71, 256])
def test_nothing_waits_for_pages_when_the_model_is_checked(page_tokens: int) -> None:
    def steps(num_pages: int) -> list[list[tuple[int, int]]]:
        planned: list[list[tuple[int, int]]] = []

        def step(chunks: Sequence[Chunk]) -> torch.Tensor:
            planned.append([(chunk.sequence.arrival, chunk.tokens) for chunk in chunks])
            return torch.ones(sum(chunk.completes for chunk in chunks), 2)

        runner: Any = SimpleNamespace(
            step=step,
            replays=lambda chunks: False,
            reference_logits=lambda ids: torch.ones(1, 2),
            layers={0: SimpleNamespace(shape=SimpleNamespace(dtype=torch.float32))},
            vocab_size=100,
            cache=SimpleNamespace(num_pages=num_pages + 1, page_tokens=page_tokens),
            fixed_rows=None,
            quantized=False,
        )
        assert check_model(runner) is None
        return planned

    assert steps(build._check_pages(page_tokens)) == steps(10_000)
