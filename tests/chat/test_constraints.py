"""Grammars of answers: whatever they let through is read as calls whose arguments validate."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
from answer_cuts import parts_of
from small_tokenizers import byte_level_backend

from serve_app.chat.answers import AnswerFormat, AnswerFormats
from serve_app.chat.call_grammar import call_forms
from serve_app.chat.constraints import Constraints
from serve_app.chat.detokenizer import new_detokenizer
from serve_app.chat.options import ChatOptions, Tool, ToolChoice
from serve_app.chat.parts import ArgumentsPart, CallPart, ReasoningPart, TextPart
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.chat.tool_formats import harmony
from serve_app.chat.tool_formats.choice import HARMONY, new_tool_format
from serve_app.grammar import Vocabulary, compile_grammar, make_vocabulary

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", 'P"ris']}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = (Tool("get_weather", "", SCHEMA, True), Tool("now", "", {"type": "object", "additionalProperties": False}))
FORMATS = [
    *("hermes", "qwen3_coder", "glm", "minimax", "function_gemma", "gemma4", "tool_code", "llama3_json", "pythonic"),
    *("mistral", "deepseek", "kimi", HARMONY),
]
TEMPLATES = {"": FORMATS, "[ARGS]": ["mistral"], "```json": ["deepseek"]}
CASES = [(name, template) for template, names in TEMPLATES.items() for name in names]
TEXT = json.dumps({"grammars": [{"lark_grammar": 'start: "Yes" | "No"'}]})


@cache
def tokens() -> tuple[ChatTokenizer, Vocabulary]:
    """A tokenizer that has the marks of all formats as special tokens, but for `<tool_call>` and `<think>`."""
    backend = byte_level_backend()
    backend.add_tokens(["<tool_call>", "</tool_call>"])
    for name in FORMATS:
        marks = harmony.TOKENS if name == HARMONY else new_tool_format(name, {}).begins
        marks += () if name == HARMONY else new_tool_format(name, {}).tokens
        backend.add_special_tokens([mark for mark in marks if mark[:1] in "<[" and "tool_call>" not in mark])
    text = backend.to_str()
    names = [token["content"] for token in json.loads(text)["added_tokens"]]
    tokenizer = ChatTokenizer(text, control_tokens=names, template=None, special_tokens={}, adds_bos=False)
    return tokenizer, make_vocabulary(json.loads(text))


def written(grammar: str, answer: AnswerFormat, seed: int) -> str:
    """A text that the grammar lets through, each token drawn from those that may come."""
    tokenizer, vocabulary = tokens()
    draw = random.Random(seed)
    marks_of_all = set(tokenizer.added_tokens.values())
    matcher = compile_grammar(vocabulary, grammar).deep_copy()
    detokenizer = new_detokenizer(tokenizer, shown_tokens=answer.shown_tokens)
    text = ""
    for _ in range(2000):
        mask = matcher.compute_bitmask()
        allowed = [index for index in range(vocabulary.accept_id + 1) if mask[index // 8] >> index % 8 & 1]
        if vocabulary.accept_id in allowed and (len(allowed) == 1 or draw.random() < 0.6):
            return text + detokenizer.flush()
        allowed = [index for index in allowed if index != vocabulary.accept_id]
        marks = [index for index in allowed if index in marks_of_all]
        token_id = draw.choice(marks if marks and draw.random() < 0.1 else allowed)
        assert matcher.consume_token(token_id)
        text += detokenizer.push(token_id)
    raise AssertionError(f"no end: {text!r}")


def lets_through(grammar: str, text: str, *, spelled: bool = False) -> bool:
    """`spelled`: control tokens come in ordinary ones."""
    tokenizer, vocabulary = tokens()
    matcher = compile_grammar(vocabulary, grammar).deep_copy()
    ids = tokenizer.encode_text(text, add_bos=False, parse_special=not spelled)
    return all(map(matcher.consume_token, ids)) and bool(matcher.is_accepting())


def formats(name: str, template: str = "", **settings: str) -> tuple[AnswerFormats, Constraints]:
    tokenizer, _ = tokens()
    made = AnswerFormats(template, tokenizer.skipped_tokens, tool_format=name, **settings)
    return made, Constraints(template, tokenizer.added_tokens)


def calls_of(answer: AnswerFormat, text: str) -> list[tuple[str, Any]]:
    parts = parts_of(answer, [text])
    assert all(isinstance(part, CallPart | ArgumentsPart | ReasoningPart) for part in parts), text
    names = [part.name for part in parts if isinstance(part, CallPart)]
    return list(zip(names, (json.loads(p.text) for p in parts if isinstance(p, ArgumentsPart)), strict=True))


@pytest.mark.parametrize(("name", "template"), CASES)
@pytest.mark.parametrize("choice", [ToolChoice("required"), ToolChoice("named", "get_weather")])
def test_forced_calls_are_read_and_their_arguments_validate(name: str, template: str, choice: ToolChoice) -> None:
    made, constraints = formats(name, template)
    options = ChatOptions(tools=TOOLS, tool_choice=choice)
    answer = made.of("", options)
    assert answer is not None
    grammar = constraints.of(options, answer)
    seen = set()
    for seed in range(12):
        calls = calls_of(answer, written(grammar, answer, seed))
        assert calls
        for called, arguments in calls:
            seen.add(called)
            if called == "now":
                assert arguments == {}
            else:
                assert arguments.keys() == {"city", "days"}
                assert arguments["city"] in ("Rome", 'P"ris')
                assert arguments["days"] in range(10)
    assert seen == ({"get_weather"} if choice.name else {"get_weather", "now"})


@pytest.mark.parametrize("name", FORMATS)
def test_without_a_strict_tool_nothing_is_constrained(name: str) -> None:
    made, constraints = formats(name)
    options = ChatOptions(tools=TOOLS[1:])
    assert constraints.of(options, made.of("", options)) == ""
    none = ChatOptions(tools=TOOLS, tool_choice=ToolChoice("none"))
    assert constraints.of(none, made.of("", none)) == ""


@pytest.mark.parametrize(("name", "template"), CASES)
def test_with_a_strict_tool_text_is_free_and_calls_are_not(name: str, template: str) -> None:
    made, constraints = formats(name, template)
    options, forced = ChatOptions(tools=TOOLS), ChatOptions(tools=TOOLS, tool_choice=ToolChoice("named", "get_weather"))
    answer = made.of("", options)
    assert answer is not None
    grammar = constraints.of(options, answer)
    call = written(constraints.of(forced, answer), answer, seed=1)
    said = "<|channel|>final<|message|>Well, [1] or {2}." if name == HARMONY else "Well, [1] or {2}."
    assert lets_through(grammar, said)
    assert lets_through(grammar, call)
    before = "Well, "
    if name == HARMONY:
        before = "<|channel|>commentary<|message|>Well.<|end|><|start|>assistant"
    if name not in ("llama3_json", "pythonic"):
        assert lets_through(grammar, before + call)
    assert not lets_through(grammar, before * (name == HARMONY) + call.replace('"days"', '"other"'))
    assert not lets_through(grammar, call.replace("get_weather", "unknown"))


BAD = '{"name": "get_weather", "parameters": {"other": 1}}'


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        (
            "qwen3_coder",
            'Well. <function=now>\n{}\n</function> <tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>.',
            "Well. <function=get_weather>\n<parameter=other>\n1\n</parameter>\n</function>",
        ),
        (
            "deepseek",
            "Well. <｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
            'Well. <｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"other": 1}<｜tool▁call▁end｜>',
        ),
        (
            "kimi",
            "Well. <|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>",
            "Well. <|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
        ),
        ("llama3_json", 'Well. <|python_tag|>{"name": "now", "parameters": {}} Well.', f"Well. <|python_tag|>{BAD}"),
        ("llama3_json", "Well. {", f'<|python_tag|>{{"name": "now", "parameters": {{}}}} {BAD}'),
        (
            "pythonic",
            '<|python_start|>{"name": "now", "arguments": {}}',
            "Well. <|python_start|>[get_weather(other=1)]<|python_end|>",
        ),
        ("pythonic", 'Well. <|python_tag|>{"name": "now", "arguments": {}}', f"Well. <|python_tag|>{BAD}"),
        (
            HARMONY,
            "<|channel|>final<|message|>Well. <|chan",
            "<|channel|>final<|message|>Well.<|end|><|channel|>commentary to=functions.get_weather<|message|>{}",
        ),
    ],
)
@pytest.mark.parametrize("spelled", [False, True])
def test_no_call_of_a_strict_tool_gets_past_the_grammar(name: str, good: str, bad: str, spelled: bool) -> None:
    """`spelled`: the marks come in ordinary tokens."""
    made, constraints = formats(name)
    answer = made.of("", ChatOptions(tools=TOOLS))
    assert answer is not None
    grammar = constraints.of(ChatOptions(tools=TOOLS), answer)
    assert any(isinstance(part, CallPart) for part in parts_of(answer, [bad]))
    assert not lets_through(grammar, bad, spelled=spelled)
    if not (spelled and name == HARMONY):  # the marks around its messages must be tokens
        assert lets_through(grammar, good, spelled=spelled)
    calls = [part.name for part in parts_of(answer, [good]) if isinstance(part, CallPart)]
    assert set(calls) <= {"now"}
    assert len(calls) == good.count("now")


@pytest.mark.parametrize(("name", "template"), [case for case in CASES if case[0] != HARMONY])
def test_the_grammar_knows_every_mark_that_begins_calls(name: str, template: str) -> None:
    forms = call_forms(name, template)
    assert {form.mark for form in forms} - {""} == set(new_tool_format(name, {}).begins)


@pytest.mark.parametrize(
    "name", ["hermes", "qwen3_coder", "glm", "deepseek", "kimi", "pythonic", "llama3_json", HARMONY]
)
def test_text_that_has_a_grammar_may_look_like_calls(name: str) -> None:
    made, _ = formats(name)
    marks = harmony.TOKENS if name == HARMONY else new_tool_format(name, {}).begins
    said = json.dumps([f"{mark}now" for mark in marks] + ["<function=now></function>"], ensure_ascii=False)
    text_grammar = json.dumps({"grammars": [{"lark_grammar": "start: /(?s:.*)/"}]})
    for tools in (TOOLS, ()):
        answer = made.of("", ChatOptions(tools=tools, text_grammar=text_grammar))
        before = "<|channel|>final<|message|>" if name == HARMONY else ""
        if answer is not None:
            assert parts_of(answer, list(before + said)) == [TextPart(said)]
            assert parts_of(answer, [before + said]) == [TextPart(said)]


DECLARED = {
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "content": {"close": "<|im_end|>", "content": "text"},
    }
}


@pytest.mark.parametrize("begun", ["", "<think>\n"])
def test_text_has_its_grammar_behind_the_reasoning_of_a_model_that_declares_its_format(begun: str) -> None:
    tokenizer, _ = tokens()
    made = AnswerFormats("<think></think>", tokenizer.skipped_tokens, declared=DECLARED)
    constraints = Constraints("", tokenizer.added_tokens)
    options = ChatOptions(text_grammar=TEXT)
    answer = made.of(f"<|im_start|>assistant\n{begun}", options)
    assert answer is not None
    written = f"{'' if begun else '<think>'}Hm, [1]\n</think>\n\nYes"
    assert lets_through(constraints.of(options, answer), written)
    assert parts_of(answer, list(written)) == [ReasoningPart("Hm, [1]"), TextPart("Yes")]


@pytest.mark.parametrize(("name", "template"), CASES)
def test_text_with_a_grammar_and_calls_go_together(name: str, template: str) -> None:
    made, constraints = formats(name, template)
    options = ChatOptions(tools=TOOLS, text_grammar=TEXT)
    answer = made.of("", options)
    assert answer is not None
    grammar = constraints.of(options, answer)
    texts = {written(grammar, answer, seed) for seed in range(12)}
    final = "<|channel|>final<|message|>" if name == HARMONY else ""
    said = {text for text in texts if text in (f"{final}Yes", f"{final}No")}
    assert said
    assert all(calls_of(answer, text) for text in texts - said if "analysis" not in text)
    assert not lets_through(grammar, f"{final}Maybe")


@pytest.mark.parametrize("begun", [True, False])
def test_reasoning_before_them_is_free(begun: bool) -> None:
    made, constraints = formats("hermes", reasoning_format="think")
    options = ChatOptions(tools=TOOLS, tool_choice=ToolChoice("required"))
    answer = made.of("<|im_start|>assistant\n" + "<think>\n" * begun, options)
    assert answer is not None
    grammar = constraints.of(options, answer)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert lets_through(grammar, f"{'<think>' * (not begun)}\nHm, [1]\n</think>\n\n{call}")
    assert lets_through(grammar, call) is not begun
    assert not lets_through(grammar, f"{'<think>' * (not begun)}Hm</think>Hi")
    assert calls_of(answer, f"{'<think>' * (not begun)}\nHm, [1]\n</think>\n\n{call}") == [("now", {})]


def test_text_of_a_model_with_channels_has_its_grammar_in_the_last_one() -> None:
    made, constraints = formats(HARMONY)
    options = ChatOptions(text_grammar=TEXT)
    grammar = constraints.of(options, made.of("", options))
    analysis = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    assert lets_through(grammar, f"{analysis}<|channel|>final<|message|>Yes")
    assert lets_through(grammar, "<|channel|>final<|message|>No")
    assert not lets_through(grammar, "Yes")


def test_where_calls_are_text_none_can_be_forced() -> None:
    made, constraints = formats("none")
    options = ChatOptions(tools=TOOLS, tool_choice=ToolChoice("required"))
    with pytest.raises(PromptError, match=r"chat\.tool_format") as caught:
        constraints.of(options, made.of("", options))
    assert caught.value.param == "tool_choice"
