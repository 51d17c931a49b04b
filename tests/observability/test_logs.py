from __future__ import annotations

import asyncio
import logging

import pytest
from simulated_time import simulated_time

from serve_app.observability.logs import MOST_REFUSALS, REFUSALS_S, AccessLog, RequestRecord, log_access, request_id_var


def test_times_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("serve_app.observability.logs.monotonic", lambda: now)
    record = RequestRecord("abc", arrived=10.0)
    assert (record.time_to_first_token_s, record.inter_token_latency_s) == (None, None)
    now = 10.5
    record.saw_tokens(1)
    assert (record.time_to_first_token_s, record.inter_token_latency_s) == (0.5, None)
    now = 11.5
    record.saw_tokens(2)
    assert (record.time_to_first_token_s, record.inter_token_latency_s, record.output_tokens) == (0.5, 0.5, 3)


def test_the_line_of_a_request_that_never_began(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "serve_app.access"):
        log_access(RequestRecord("abc", "/stream"))
        log_access(RequestRecord("def", "/health"), logging.DEBUG)
    (line,) = caplog.messages
    assert line.startswith("request_id=abc endpoint=/stream status=499 outcome=disconnected ")
    assert "ttft_s=-" in line


async def test_a_flood_of_refusals_is_counted_and_other_requests_keep_their_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "serve_app.access")
    log = AccessLog()
    ids: dict[str, str] = {}
    told = caplog.handler.emit

    def emit(record: logging.LogRecord) -> None:
        ids[record.getMessage()] = request_id_var.get()
        told(record)

    monkeypatch.setattr(caplog.handler, "emit", emit)
    request_id_var.set("of the first request")
    with simulated_time():
        for number in range(MOST_REFUSALS + 7):
            log.ended(RequestRecord(f"refused-{number}", "/stream", status=503, outcome="overloaded"))
        log.ended(RequestRecord("good", "/stream", status=200, outcome="stop"))
        log.ended(RequestRecord("bad", "/stream", status=500, outcome="internal_error"))
        assert len(caplog.messages) == MOST_REFUSALS + 2
        await asyncio.sleep(1.5 * REFUSALS_S)
        assert caplog.messages[-1] == "refused=7 more endpoint=/stream status=503 outcome=overloaded"
        assert ids[caplog.messages[-1]] == "-", "it is of no request"
        log.ended(RequestRecord("later", "/stream", status=503, outcome="overloaded"))
        assert caplog.messages[-1].startswith("request_id=later ")
        await asyncio.sleep(1.5 * REFUSALS_S)
        assert len(caplog.messages) == MOST_REFUSALS + 4, "nothing was left out: nothing is said"
