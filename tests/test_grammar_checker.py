"""Grammars that would harm the process that compiles them, and what becomes of the process that tries them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLParserLimits
from running_streams import until
from small_tokenizers import byte_level_backend

from serve_app import grammar as grammar_module
from serve_app import grammar_checker, grammar_sandbox
from serve_app.chat.gbnf import gbnf_to_lark
from serve_app.core import FailureCode, RequestError
from serve_app.grammar import MAX_GRAMMAR_BYTES, Vocabulary, compile_grammar, make_vocabulary
from serve_app.grammar_checker import GrammarChecker
from serve_app.grammar_sandbox import NotTried, OutOfTime, later_fault, try_in_fork

TEXT = LLMatcher.grammar_from_regex("(?s:.)*")
ARITHMETIC = """root ::= (expr "=" ws term "\\n")+
expr ::= term ([-+*/] term)*
term ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num ::= [0-9]+ ws
ws ::= [ \\t\\n]*
"""
FINE = 'start: "a"'
DEEP = "start: a0\n" + "".join(f'a{index}: "x" a{index + 1}\n' for index in range(4000)) + 'a4000: "x"'
SLOW = json.dumps({"grammars": [{"json_schema": {"type": "integer", "multipleOf": 1234567}}]})


def grammar_of_properties(count: int) -> str:
    properties = {f"p{number}": {"type": "string"} for number in range(count)}
    return LLMatcher.grammar_from_json_schema({"type": "object", "properties": properties})


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
    assert checker._sandboxes[0].process is not None
    return checker._sandboxes[0].process


def test_a_fork_says_what_is_wrong_or_how_it_died(vocabulary: Vocabulary) -> None:
    assert try_in_fork(vocabulary, FINE) == ""
    assert "foo" in try_in_fork(vocabulary, "start: foo")
    assert try_in_fork(vocabulary, DEEP) == "it is nested too deeply"
    with pytest.raises(OutOfTime):
        try_in_fork(vocabulary, SLOW, 0.1)


def test_a_fork_that_needs_too_much_memory(folder: Path) -> None:
    """In a process like the sandbox. One that has freed much memory, as this may have, leaves it to a fork."""
    script = """if True:
        import sys
        from pathlib import Path
        from serve_app import grammar_sandbox
        from serve_app.grammar import load_vocabulary
        grammar_sandbox.MEMORY_LIMIT_BYTES = 2**26
        print(grammar_sandbox.try_in_fork(load_vocabulary(Path(sys.argv[1])), sys.argv[2], 20))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", script, str(folder), SLOW]
    assert "memory" in subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_an_end_that_is_not_the_grammars_fault_is_no_verdict(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_sandbox, "try_grammar", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(NotTried, match="was ended by signal 9"):
        try_in_fork(vocabulary, FINE)

    def no_fork() -> int:
        raise OSError("no more processes")

    monkeypatch.setattr(os, "fork", no_fork)
    with pytest.raises(NotTried, match="no more processes"):
        try_in_fork(vocabulary, FINE)


def lark(text: str) -> str:
    return LLMatcher.grammar_from_lark(text)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (lark(gbnf_to_lark('root ::= e\ne ::= e e | [a-z ] | ""')), "parser error: Too many items"),
        (lark("start: e\ne: e e e | e e | A\nA: /[a-z ]/"), "parser error: Too many items"),
        (LLMatcher.grammar_from_regex("[a-z ]*[a-m][a-z ]{16}"), "lexer error"),
        (LLMatcher.grammar_from_regex("(?s:.)*[a-m](?s:.){40}[a-z](?s:.){40}"), "lexer error"),
        (grammar_of_properties(500), "Parser Error: Current row has"),
    ],
)
def test_a_grammar_that_is_compiled_but_fails_later_is_refused(
    grammar: str, reason: str, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The vocabulary is small, and so are the masks: with 49,152 tokens these grammars reach the real limits.
    small = LLParserLimits(step_max_items=400, max_lexer_states=2000, step_lexer_fuel=10_000, verbose_errors=False)
    if "Current row" not in reason:
        monkeypatch.setattr(grammar_module, "LIMITS", small)
    fault = later_fault(vocabulary, compile_grammar(vocabulary, grammar))
    assert re.match(f"the grammar can't be used: after [0-9]+ tokens of an output: {reason}", fault)


def test_a_grammar_whose_masks_take_long_is_refused(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_sandbox, "MEAN_LIMIT_S", 0)
    assert "too ambiguous" in later_fault(vocabulary, compile_grammar(vocabulary, TEXT))


def test_ordinary_grammars_are_not_refused(vocabulary: Vocabulary) -> None:
    person = {"type": "object", "properties": {"v": {"type": ["string", "number"]}, "of": {"$ref": "#"}}}
    formats = ("email", "date-time", "uuid", "hostname", "ipv6", "uri")
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(30):
        deep = {"type": "object", "properties": {"a": deep, "b": {"type": "array"}}, "required": ["a"]}
    kinds = [{"properties": {"kind": {"const": f"k{n}"}, f"x{n}": {}}, "required": ["kind"]} for n in range(40)]
    for schema in (
        {},
        {"type": "object"},
        person,
        deep,
        {"enum": [f"word {number} {number * 'x'}" for number in range(500)]},
        {"items": {"anyOf": kinds}, "type": "array"},
        {"type": "array", "items": {"type": "string", "minLength": 10, "maxLength": 2000}, "maxItems": 500},
        {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(200)}},
        *(
            {"type": "object", "properties": {"a": {"type": "string", "format": one}}, "required": ["a"]}
            for one in formats
        ),
    ):
        text = LLMatcher.grammar_from_json_schema(schema)
        assert later_fault(vocabulary, compile_grammar(vocabulary, text)) == "", schema
    for text in (TEXT, lark(gbnf_to_lark(ARITHMETIC))):
        assert later_fault(vocabulary, compile_grammar(vocabulary, text)) == ""


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
    places = grammar_checker.MAX_WAITING + grammar_checker.SANDBOXES
    asked = [asyncio.create_task(checker.fault(f'start: "{index}"')) for index in range(places)]
    await asyncio.sleep(0)
    with pytest.raises(RequestError) as refused:
        await checker.fault('start: "one more"')
    assert refused.value.code == FailureCode.OVERLOADED
    assert await asyncio.gather(*asked) == [""] * len(asked)
    assert await checker.fault('start: "one more"') == ""


async def test_callers_take_turns_and_slow_grammars_keep_one_sandbox_at_most(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    running: set[str] = set()
    go_on = asyncio.Event()

    async def run(sandbox: object, check: Any) -> str:
        begun.append(f"{check.grammar} {check.cpu_limit_s:g}")
        if check.cpu_limit_s == grammar_sandbox.CPU_LIMIT_S:
            running.add(check.grammar)
            await go_on.wait()
            assert len(running) == 1
            running.discard(check.grammar)
        else:
            await asyncio.sleep(0)
        if check.grammar[0] == "a":
            raise OutOfTime
        return "fine"

    monkeypatch.setattr(grammar_checker._Sandbox, "run", run)
    slow = [asyncio.create_task(checker.fault(f"a{number}", "a")) for number in range(8)]
    await asyncio.sleep(0)
    with pytest.raises(RequestError):
        await asyncio.gather(*(checker.fault(f"more{number}", "a") for number in range(9)))
    assert await checker.fault("b0", "b") == "fine", "though the slow ones are not over"
    assert begun.index("b0 0.25") <= 5
    go_on.set()
    assert await asyncio.gather(*slow) == [grammar_sandbox.TOO_SLOW] * 8
    assert checker._checks == {}


async def test_what_is_no_verdict_is_not_remembered(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    started = subprocess.Popen

    def no_process(*arguments: Any, **options: Any) -> Any:
        raise OSError("no memory")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    with pytest.raises(RequestError, match="can't be started") as refused:
        await checker.fault(FINE)
    assert refused.value.code == FailureCode.OVERLOADED
    asked = asyncio.create_task(checker.fault(FINE))
    await asyncio.sleep(0)
    asked.cancel()
    await asyncio.wait({asked})
    monkeypatch.setattr(subprocess, "Popen", started)
    await until(lambda: not checker._checks)
    assert await checker.fault(FINE) == ""


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
    assert not any(sandbox.started for sandbox in checker._sandboxes)
