"""A watch over what is logged while a test runs: no line may hold the whole id of a stream."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from serve_app.resume import registry, stream_id

_OF_TESTS = {"httpx", "httpcore", "openai", "uvicorn"}
"""Libraries by which tests send and take requests, and which log their paths."""


class _Lines(logging.Handler):
    """Keeps every line as text, tracebacks included."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] not in _OF_TESTS:
            self.lines.append(self.format(record))


@contextmanager
def unlogged_stream_ids(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test in which the id of a new stream is logged whole, by us or by a library that we use."""
    given: list[str] = []

    def note() -> str:
        given.append(stream_id.new_stream_id())
        return given[-1]

    monkeypatch.setattr(registry, "new_stream_id", note)
    root, ours, watch = logging.getLogger(), logging.getLogger("serve_app"), _Lines()
    level = ours.level
    root.addHandler(watch)
    ours.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.removeHandler(watch)
        ours.setLevel(level)
    told = [line for line in watch.lines if any(whole in line for whole in given)]
    assert not told, told
