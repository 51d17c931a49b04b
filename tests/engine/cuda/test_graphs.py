"""Recorded steps: which sizes there are, that they compute what ordinary steps do, and that wrong ones never serve.

No GPU: the recordings run the computation again, on the inputs that were put where a graph would read them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, FakeEvent
from tabled_attention import Recorder, TabledPlain
from tiny_models import CONTEXT, VOCAB, tiny_model

from serve_app.config import EngineConfig
from serve_app.engine.attention.base import AttentionParams, Span
from serve_app.engine.cuda.graphs import StepShape, step_shapes
from serve_app.engine.inputs import StepInputs
from serve_app.engine.kv_cache import KVCache
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.recording import record_graphs

PAGES = 64


class Faulty(Recorder):
    """A device whose recordings go wrong in one way."""

    def __init__(self, fault: str, at_rows: int | None = None) -> None:
        super().__init__()
        self._fault, self._at_rows = fault, at_rows

    def __call__(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        replay = super().__call__(run)
        rows = replay().shape[0]
        if self._at_rows not in (None, rows):
            return replay
        if self._fault == "can't record":
            raise RuntimeError("operation not permitted when stream is capturing\nand a trace")
        if self._fault == "no memory":
            raise torch.OutOfMemoryError("out of memory")
        first = replay().clone()

        def wrong() -> torch.Tensor:
            match self._fault:
                case "always the first result":
                    return first
                case "a row is NaN":
                    output = replay()
                    output[-1] = float("nan")
                    return output
                case "one bit":
                    output = replay()
                    output[0, 0] = torch.nextafter(output[0, 0], torch.tensor(9.0))
                    return output
                case "rows swapped":
                    return replay().flip(0)
            raise AssertionError(self._fault)

        return wrong


class Careless(TabledPlain):
    """Gets padding or writing wrong where the ordinary path has none."""

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def write(
        self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        last = (keys.shape[0] - 1) * keys.shape[1]
        if self._fault == "padding to page 0":
            slots = torch.where(slots == last, torch.zeros_like(slots), slots)
        super().write(keys, values, slots, key, value)

    def view(self, table: torch.Tensor, rows: int, most_spans: int) -> Any:
        seen, pages = super().view(table, rows, most_spans)
        # A recording that keeps the table it was made with, though the device's has changed.
        return (seen, pages.clone() % PAGES) if self._fault == "old pages" and most_spans else (seen, pages)


def runner_on(backend: Any, kind: str = "llama", fixed: tuple[int, int] | None = None) -> tuple[ModelRunner, KVCache]:
    torch.set_num_threads(1)
    with torch.inference_mode(False):
        model = tiny_model(kind)  # other tests share it
    runner = ModelRunner(model, fixed)
    cache = KVCache({i: layer.shape for i, layer in runner.layers.items()}, PAGES + 1, backend.page_tokens)
    runner.use(backend, cache)
    return runner, cache


def record(capture: Any, backend: Any = None, kind: str = "llama", **settings: Any) -> tuple[ModelRunner, list[str]]:
    backend = backend or TabledPlain()
    config = EngineConfig(**({"max_running": 4, "max_step_tokens": 6} | settings))
    fixed = (6, 4) if config.batch_invariant else None
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("serve_app.engine.recording.CudaCapture", lambda device: capture)
        runner, cache = runner_on(backend, kind, fixed)
        notes = record_graphs(runner, backend, config, CONTEXT)
    assert all(not stored[:-1].any() for i in runner.layers for stored in cache.layer(i)), "the check leaves zeros"
    return runner, notes


def step_of(lengths: list[tuple[int, int]]) -> StepInputs:
    """(new tokens, tokens in all) of each sequence, pages from the end of the cache backwards."""
    inputs, page = StepInputs([], [], [], [], []), PAGES - 1
    for new, total in lengths:
        pages = tuple(range(page, page - -(-total // 16), -1))
        page -= len(pages)
        inputs.spans.append(Span(len(inputs.ids), new, total, (), pages))
        for position in range(total - new, total):
            inputs.ids.append((31 * position + total) % VOCAB)
            inputs.positions.append(position)
            inputs.slots.append(pages[position // 16] * 16 + position % 16)
        inputs.kept.append(len(inputs.ids) - 1)
    return inputs


def test_sizes_are_few_and_reach_the_largest_step() -> None:
    rows = [shape.rows for shape in step_shapes(32, 512, None)]
    assert rows == [1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512]
    assert [shape.rows for shape in step_shapes(5, 3, None)] == [1, 2, 4, 5]
    assert step_shapes(1, 1, None) == [StepShape(1, 1)]
    assert step_shapes(300, 100, None)[-1] == StepShape(300, 300)
    assert step_shapes(32, 8192, None)[-1].rows == 1024
    assert step_shapes(32, 512, (512, 32)) == [StepShape(512, 32)]
    assert all(shape.kept >= min(shape.rows, 32) for shape in step_shapes(32, 512, None))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@torch.inference_mode()
def test_a_recording_computes_what_the_ordinary_step_does(kind: str) -> None:
    recorder = Recorder()
    runner, notes = record(recorder, kind=kind)
    assert notes == []
    graphs = runner.graphs
    assert graphs is not None
    assert [shape.rows for shape in graphs.shapes] == [1, 2, 4, 6]
    for lengths in ([(1, 40)], [(1, 3), (1, 70), (1, 17)], [(3, 9), (1, 33)], [(6, 6)], [(1, 5)] * 4):
        inputs = step_of(lengths)
        before = recorder.replayed
        found = graphs.run(inputs)
        assert recorder.replayed == before + 1
        assert found is not None
        torch.testing.assert_close(found, runner.compute(inputs), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_result_stays_when_the_next_step_is_computed() -> None:
    runner, _ = record(Recorder())
    assert runner.graphs is not None
    first = runner.graphs.run(step_of([(1, 9)]))
    assert first is not None
    kept = first.clone()
    runner.graphs.run(step_of([(1, 30)]))
    assert torch.equal(first, kept)


@torch.inference_mode()
def test_inputs_are_waited_for_on_the_device_that_they_go_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step's may not overwrite what is on its way; an event is recorded on the current device's stream."""
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    runner, _ = record(Recorder())
    graphs: Any = runner.graphs
    graphs._copied, graphs._device = FakeEvent(cuda), torch.device("cuda", 1)
    graphs.run(step_of([(1, 9)]))
    graphs.run(step_of([(1, 30)]))
    assert [what for what, _ in cuda.log] == ["event waited for", "event"] * 2
    assert [device for what, device in cuda.log if what == "event"] == [1, 1]


@torch.inference_mode()
def test_steps_that_fit_no_recording_are_left_to_the_ordinary_path() -> None:
    runner, _ = record(Recorder())
    assert runner.graphs is not None
    assert runner.graphs.run(step_of([(7, 7)])) is None, "more tokens than the largest has"
    sparse = step_of([(1, 5)])
    many = StepInputs(sparse.ids, sparse.positions, sparse.slots, sparse.spans, [0, 0])
    assert runner.graphs.run(many) is not None, "the next larger has the rows"
    assert runner.graphs.run(StepInputs(many.ids, many.positions, many.slots, many.spans, [0] * 7)) is None


def test_a_model_that_can_not_be_recorded_is_served_without() -> None:
    recorder = Faulty("can't record")
    runner, notes = record(recorder)
    assert recorder.recorded == 1, "the others would fail alike"
    assert notes == [
        "steps of up to 6 tokens can't be recorded as CUDA graphs: operation not permitted when stream is capturing"
    ]
    assert runner.graphs is not None
    assert runner.graphs.shapes == []


def test_a_size_without_memory_leaves_the_smaller_ones() -> None:
    runner, notes = record(Faulty("no memory", at_rows=6))
    assert len(notes) == 1
    assert runner.graphs is not None
    assert [shape.rows for shape in runner.graphs.shapes] == [1, 2, 4]


@pytest.mark.parametrize("fault", ["always the first result", "a row is NaN", "rows swapped"])
def test_a_recording_that_computes_something_else_never_serves(fault: str) -> None:
    runner, notes = record(Faulty(fault, at_rows=4))
    assert len(notes) == 1
    assert "failed its check" in notes[0]
    assert runner.graphs is not None
    assert [shape.rows for shape in runner.graphs.shapes] == [1, 2, 6]


@pytest.mark.parametrize("fault", ["padding to page 0", "old pages"])
def test_a_recording_that_reads_or_writes_other_pages_never_serves(fault: str) -> None:
    runner, notes = record(Recorder(), Careless(fault))
    assert runner.graphs is not None
    assert notes, "at least the sizes that are padded"
    assert 6 not in [shape.rows for shape in runner.graphs.shapes]


def test_one_bit_is_enough_where_bits_are_promised() -> None:
    runner, notes = record(Faulty("one bit"), batch_invariant=True)
    assert len(notes) == 1
    assert "bits" in notes[0]
    assert runner.graphs is not None
    assert runner.graphs.shapes == []
    runner, notes = record(Recorder(), batch_invariant=True)
    assert notes == []
    assert runner.graphs is not None
    assert runner.graphs.shapes == [StepShape(6, 4)]


def test_padding_rows_attend_to_nothing() -> None:
    backend = TabledPlain()
    table = torch.full((backend.table_size(4, 4, 8),), 77, dtype=torch.int64)
    used = backend.fill(table.numpy(), [Span(0, 1, 20, (), (3, 5))], 4, 4)
    prepared = backend.view(table, 4, 4)
    keys = torch.randn(6, 16, 2, 8)
    output = backend.attend(torch.randn(4, 4, 8), keys, keys, AttentionParams(0.3), prepared)
    assert used == 10
    assert output[0].any()
    assert not output[1:].any()
