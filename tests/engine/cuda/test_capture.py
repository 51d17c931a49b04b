"""How a computation is recorded as a CUDA graph: what waits for what, and on which device. By a stand-in for CUDA."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import FakeCuda

from serve_app.engine.cuda.capture import CudaCapture

SECOND = torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    return cuda


def test_a_recording_warms_up_on_its_own_stream_of_its_own_device(cuda: FakeCuda) -> None:
    def run() -> torch.Tensor:
        cuda.note("run")
        return torch.zeros(1)

    CudaCapture(SECOND)(run)
    assert [what for what, _ in cuda.log] == [
        "stream of 1 waits for default of 1",
        "on stream of 1",
        "run",
        "run",
        "off",
        "default of 1 waits for stream of 1",
        "synchronize",
        "capture from pool of 1 on stream of 1, thread_local",
        "run",
        "captured",
    ]
    assert {device for _, device in cuda.log} == {1}
    assert cuda.current == 0, "the caller's device is as it was"


def test_recordings_share_their_memory_and_replay_without_computing(cuda: FakeCuda) -> None:
    capture, runs = CudaCapture(SECOND), 0

    def run() -> torch.Tensor:
        nonlocal runs
        runs += 1
        return torch.full((2,), float(runs))

    replays = [capture(run), capture(run)]
    captures = {what for what, _ in cuda.log if what.startswith("capture ")}
    assert captures == {"capture from pool of 1 on stream of 1, thread_local"}
    before = runs
    assert replays[0]() is replays[0]()
    assert replays[0]() is not replays[1]()
    assert runs == before
    assert [what for what, _ in cuda.log].count("replay") == 4


def test_what_a_recording_raises_comes_out_and_the_device_is_as_it_was(cuda: FakeCuda) -> None:
    def run() -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    capture = CudaCapture(SECOND)
    with pytest.raises(RuntimeError, match="not permitted"):
        capture(run)
    assert cuda.current == 0
