from __future__ import annotations

import logging

import pytest

from serve_app.observability.logs import RequestRecord, log_access


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
