"""What is kept of events, in bytes: of one stream, and of many together."""

from __future__ import annotations

import gc

import pytest

from serve_app.resume import event_log
from serve_app.resume.event_log import EventLog, EventMemory, Mark, Replay
from serve_app.resume.transcript import Event


@pytest.fixture(autouse=True)
def newest_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "NEWEST_BYTES", 20)


def events(first: int, count: int, size_bytes: int = 10) -> list[Event]:
    return [Event(b"%0*d" % (size_bytes, number), number + 1) for number in range(first, first + count)]


def test_one_stream_keeps_its_newest_events() -> None:
    log = EventLog(EventMemory(10_000, 100))
    for number in range(30):
        log.append(events(number, 1))
        assert log.kept_bytes <= 100
    assert len(log) == 30
    assert log.first == 30 - log.kept_bytes // 10
    assert log.piece(log.first, 1000) == events(log.first, 30 - log.first)
    assert log.piece(28, 15) == events(28, 1)
    assert log.piece(28, 1) == events(28, 1)
    assert (log.bytes_after(0), log.bytes_after(29), log.bytes_after(99)) == (300, 10, 0)


def test_all_streams_together_are_bounded_and_the_largest_pay() -> None:
    memory = EventMemory(1000, 800)
    small = EventLog(memory)
    small.append(events(0, 10))
    large = [EventLog(memory) for _ in range(4)]
    for number in range(100):
        for log in large:
            log.append(events(number, 1))
            assert memory.kept_bytes <= 1000
    assert small.first == 0
    assert all(log.first for log in large)


def test_what_has_just_come_stays_whatever_the_limits() -> None:
    memory = EventMemory(100, 10)
    logs = [EventLog(memory) for _ in range(20)]
    for number in range(10):
        for log in logs:
            log.append(events(number, 1))
            assert log.piece(number, 10) == events(number, 1)
    assert memory.kept_bytes <= 20 * 20


def test_an_event_larger_than_the_limits_is_kept_while_it_is_the_newest() -> None:
    log = EventLog(EventMemory(100, 50))
    log.append(events(0, 1, 5000))
    assert log.piece(0, 1) == events(0, 1, 5000)
    log.append(events(1, 3))
    assert (log.first, log.kept_bytes) == (1, 30)


def test_streams_that_have_ended_take_no_room() -> None:
    memory = EventMemory(1000, 1000)
    for _ in range(50):
        log = EventLog(memory)
        log.append(events(0, 60))
        assert log.first == 0
        del log
    gc.collect()
    assert memory.kept_bytes == 0


def test_a_reader_is_known_by_the_digest_of_what_it_has() -> None:
    log = EventLog(EventMemory(1000, 50))
    log.append(events(0, 20))
    for position in (0, 1, 5, 20):
        assert not log.differs(Mark(position, position))
        assert log.differs(Mark(position, 999))
        assert not log.differs(Mark(position))
    assert not log.differs(Mark(21, 999)), "not yet"


async def test_a_replay_starts_where_the_reader_is_and_fails_aloud() -> None:
    replay = Replay(iter(events(0, 100)))
    assert await replay.piece(70, 25) == events(70, 3)
    assert await replay.piece(73, 1000) == events(73, 27)
    with pytest.raises(LookupError, match="100"):
        await replay.piece(100, 10)
