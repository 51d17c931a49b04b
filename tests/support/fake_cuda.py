"""`torch.cuda` without a GPU: which device is current, and what is asked of streams, events and graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch


class FakeCuda:
    """Writes down what happens, in order, as (what, index of the current device). The first GPU is current first."""

    def __init__(self) -> None:
        self.current = 0
        self.log: list[tuple[str, int]] = []

    def note(self, what: str) -> None:
        self.log.append((what, self.current))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In place of torch's own."""
        streams = ("stream", "current_stream", "synchronize")
        for name in ("device", "device_of", *streams, "graph", "graph_pool_handle", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: FakeStream(self, f"stream of {self.current}"))
        monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(self))

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before

    def device_of(self, tensor: torch.Tensor) -> AbstractContextManager[None]:
        return self.device(tensor.device)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.note(f"on {stream.name}")
        yield
        self.note("off")

    @contextmanager
    def graph(self, graph: FakeGraph, *, pool: str, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        self.note(f"capture from {pool} on {stream.name}, {capture_error_mode}")
        yield
        self.note("captured")

    def current_stream(self) -> FakeStream:
        return FakeStream(self, f"default of {self.current}")

    def synchronize(self) -> None:
        self.note("synchronize")

    def graph_pool_handle(self) -> str:
        return f"pool of {self.current}"

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph(self)


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self._cuda.note(f"{self.name} waits for {other.name}")


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def record(self) -> None:
        self._cuda.note("event")

    def synchronize(self) -> None:
        self._cuda.note("event waited for")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def replay(self) -> None:
        self._cuda.note("replay")


class FakeKernel:
    """A Triton kernel that only says on which device it was launched: `kernel[grid](...)`."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self._name = cuda, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self._cuda.note(self._name)
