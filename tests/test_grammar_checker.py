"""Grammars that would harm the process that compiles them, and what becomes of the process that tries them."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from small_tokenizers import byte_level_backend

from serve_app import grammar_checker, grammar_sandbox
from serve_app.core import FailureCode, RequestError
from serve_app.grammar import MAX_GRAMMAR_BYTES, Vocabulary, make_vocabulary
from serve_app.grammar_checker import GrammarChecker
from serve_app.grammar_sandbox import try_in_fork

FINE = 'start: "a"'
DEEP = "start: a0\n" + "".join(f'a{index}: "x" a{index + 1}\n' for index in range(4000)) + 'a4000: "x"'
SLOW = json.dumps({"grammars": [{"json_schema": {"type": "integer", "multipleOf": 1234567}}]})


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return make_vocabulary(json.loads(byte_level_backend().to_str()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    byte_level_backend().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
async def checker(folder: Path) -> AsyncIterator[GrammarChecker]:
    checker = GrammarChecker(folder)
    yield checker
    await checker.aclose()


def sandbox(checker: GrammarChecker) -> subprocess.Popen[bytes]:
    assert checker._sandbox is not None
    return checker._sandbox


def test_a_fork_says_what_is_wrong_or_how_it_died(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    assert try_in_fork(vocabulary, FINE) == ""
    assert "foo" in try_in_fork(vocabulary, "start: foo")
    assert try_in_fork(vocabulary, DEEP) == "it is nested too deeply"
    assert "CPU time" in try_in_fork(vocabulary, SLOW)
    monkeypatch.setattr(grammar_sandbox, "CPU_LIMIT_S", 20)
    monkeypatch.setattr(grammar_sandbox, "MEMORY_LIMIT_BYTES", 2**26)
    assert "memory" in try_in_fork(vocabulary, SLOW)


async def test_a_verdict_is_remembered(checker: GrammarChecker) -> None:
    assert await checker.fault(FINE) == ""
    process = sandbox(checker)
    process.kill()
    process.wait()
    assert await checker.fault(FINE) == ""
    assert sandbox(checker) is process, "nobody was asked"
    assert "foo" in await checker.fault("start: foo")
    assert sandbox(checker) is not process, "a new one has started"


async def test_equal_grammars_are_tried_once_though_who_asked_leaves(checker: GrammarChecker) -> None:
    first = asyncio.create_task(checker.fault(DEEP))
    others = [asyncio.create_task(checker.fault(DEEP)) for _ in range(grammar_checker.MAX_WAITING * 2)]
    await asyncio.sleep(0)
    first.cancel()
    assert set(await asyncio.gather(*others)) == {"it is nested too deeply"}


async def test_too_many_new_grammars_are_refused_at_once(checker: GrammarChecker) -> None:
    asked = [asyncio.create_task(checker.fault(f'start: "{index}"')) for index in range(grammar_checker.MAX_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(RequestError) as refused:
        await checker.fault('start: "one more"')
    assert refused.value.code == FailureCode.OVERLOADED
    assert await asyncio.gather(*asked) == [""] * len(asked)
    assert await checker.fault('start: "one more"') == ""


async def test_verdicts_are_bounded(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_checker, "MAX_VERDICTS", 2)
    for text in "abca":
        assert await checker.fault(f'start: "{text}"') == ""
    assert len(checker._verdicts) == 2


async def test_a_sandbox_that_hangs_is_replaced(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await checker.fault(FINE) == ""
    monkeypatch.setattr(grammar_checker, "WALL_LIMIT_S", 0.2)
    sandbox(checker).send_signal(signal.SIGSTOP)
    with pytest.raises(RequestError) as refused:
        await checker.fault('start: "b"')
    assert refused.value.code == FailureCode.OVERLOADED
    monkeypatch.setattr(grammar_checker, "WALL_LIMIT_S", 30)
    assert await checker.fault('start: "b"') == ""


async def test_a_sandbox_ends_when_nobody_can_ask_it(checker: GrammarChecker) -> None:
    assert await checker.fault(FINE) == ""
    process = sandbox(checker)
    assert process.stdin is not None
    process.stdin.close()
    assert await asyncio.to_thread(process.wait, 10) == 0


async def test_a_tokenizer_without_a_vocabulary_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    checker = GrammarChecker(tmp_path)
    with pytest.raises(RequestError, match="can't be used with a grammar") as refused:
        await checker.fault(FINE)
    assert refused.value.code == "unsupported_parameter"
    await checker.aclose()


@pytest.mark.parametrize("grammar", ["", "\x00", "}{", '{"grammars": 5}', "[" * 10_000, "start: \ud800", "{" * 500])
async def test_garbage_is_a_fault(checker: GrammarChecker, grammar: str) -> None:
    assert await checker.fault(grammar) != ""
    assert await checker.fault(FINE) == ""


async def test_a_long_grammar_is_not_even_tried(checker: GrammarChecker) -> None:
    assert "longer" in await checker.fault("x" * (MAX_GRAMMAR_BYTES + 1))
    assert checker._sandbox is None
