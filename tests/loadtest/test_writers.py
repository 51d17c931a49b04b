"""The measurement of the writers writes real answers, and tells protocols apart."""

from __future__ import annotations

import asyncio

import pytest

from loadtest import writers
from loadtest.writers import BASE, WHAT, events, grpc_bytes, measured, new_writers, small_tokenizer, table, work
from serve_app.chat.tokenizer import ChatTokenizer

TOKENS = 60


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return small_tokenizer()


@pytest.mark.parametrize("what", WHAT)
def test_each_protocol_writes_the_whole_answer(tokenizer: ChatTokenizer, what: str) -> None:
    done = work(tokenizer, what, TOKENS)
    assert len(done.deltas) == done.usage.completion_tokens == TOKENS
    for name, make in new_writers(tokenizer, done.request).items():
        written = b"".join(events(make(), done)).decode()
        assert written.count("\n\n") > TOKENS / 2, name
        assert str(TOKENS) in written, f"{name} ends with the usage"
        if what == "calls" and name in ("chat", "messages", "responses"):
            assert '"note"' in written
        if what == "logprobs" and name in ("chat", "completions", "responses"):
            assert "-0.51234567" in written
    assert asyncio.run(grpc_bytes(new_writers(tokenizer, done.request)[BASE], done)) > TOKENS


def test_the_table_has_every_protocol_and_its_difference(tokenizer: ChatTokenizer) -> None:
    figures = {"text": measured(tokenizer, work(tokenizer, "text", TOKENS), 2)}
    assert figures["text"][BASE]["more_us"] == 0
    assert all(cost["us"] > 0 and cost["bytes"] > 0 for cost in figures["text"].values())
    printed = table(figures)
    assert [row.split(" | ")[0] for row in printed.splitlines()[2:]] == [f"| {name}" for name in figures["text"]]


def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["writers", "--tokens", "0"])
    with pytest.raises(SystemExit):
        writers.main()
