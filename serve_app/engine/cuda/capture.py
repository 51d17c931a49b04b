"""Records a computation on a CUDA device once, to repeat it with one launch.

A replay computes from the memory that the recording read: write the inputs there first. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Replay = Callable[[], torch.Tensor]
"""Repeats the recorded computation. Its result overwrites the last one, and the results of other recordings of the same
`Capture`."""
Capture = Callable[[Callable[[], torch.Tensor]], Replay]
"""Records a computation. Raises RuntimeError when it can't be recorded."""

_WARM_UPS = 2
"""Runs before the recording: they compile kernels and allocate what libraries keep."""


class CudaCapture:
    """CUDA graphs of one device that share their memory: the result of one is lost when another is replayed.

    The device is selected for each use, because a new stream, `current_stream` and `synchronize` belong to the thread's
    current device, which is the first GPU unless another is selected.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], torch.Tensor]) -> Replay:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # With `thread_local`, other threads' work on the device is no part of the recording and does not abort it.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay
