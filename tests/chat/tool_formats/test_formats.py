"""Every format's calls, as its models write them: whole, in any cut, broken, and among garbage."""

from __future__ import annotations

import json
from itertools import pairwise

import msgspec
import pytest
from answer_cuts import TOOLS, harmed, parts_of, random_cuts
from exploring import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_text import kept_characters

from serve_app.chat.answers import AnswerFormat, new_parser
from serve_app.chat.parts import ArgumentsPart, CallPart, Part, TextPart
from serve_app.chat.tool_formats.choice import new_tool_format

PARIS = {"city": 'Paris "75"', "days": 3}
BOTH = [("get_weather", PARIS), ("now", {})]
RAW = r'{"city": "Paris \"75\"", "days": 3}'

FIXTURES: list[tuple[str, str, str, list[tuple[str, object]]]] = [
    (
        "hermes",
        f'I look.\n<tool_call>\n{{"name": "get_weather", "arguments": {RAW}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "I look.",
        BOTH,
    ),
    ("hermes", f'<tool_call>{{"arguments": {RAW}, "name": "get_weather"}}</tool_call>', "", BOTH[:1]),
    ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(RAW)}}}</tool_call>', "", BOTH[:1]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", BOTH[1:]),
    ("hermes", '<tool_call>{"type": "function", "function": {"name": "now"}}</tool_call>', "", BOTH[1:]),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', "", [("unknown", {})]),
    ("llama3_json", f'{{"name": "get_weather", "parameters": {RAW}}}', "", BOTH[:1]),
    (
        "llama3_json",
        f'<|python_tag|>{{"name": "get_weather", "parameters": {RAW}}}; {{"name": "now", "parameters": {{}}}}',
        "",
        BOTH,
    ),
    ("llama3_json", '{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
    ("pythonic", "[get_weather(city='Paris \"75\"', days=3), now()]", "", BOTH),
    ("pythonic", '<|python_start|>[get_weather(city="Paris \\"75\\"", days=3), now()]<|python_end|>', "", BOTH),
    (
        "pythonic",
        "[get_weather(city=[None, True, -1.5, 'a\\n\\u00e9\\x41', ('x',), {'k': {1: False}}], days=0x10)]",
        "",
        [("get_weather", {"city": [None, True, -1.5, "a\néA", ["x"], {"k": {"1": False}}], "days": 16})],
    ),
    ("pythonic", "[1, 2, 3]", "[1, 2, 3]", []),
    (
        "tool_code",
        "Let me.\n```tool_code\nprint(get_weather(city='Paris \"75\"', days=3))\nnow()\n```",
        "Let me.",
        BOTH,
    ),
    (
        "mistral",
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {RAW}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
        BOTH,
    ),
    ("mistral", f"So:[TOOL_CALLS]get_weather[ARGS]{RAW}[TOOL_CALLS]now[CALL_ID]a1b2c3d4e[ARGS]{{}}", "So:", BOTH),
    (
        "deepseek",
        "Well.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        f"{RAW}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Well.",
        BOTH,
    ),
    (
        "deepseek",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{RAW}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        BOTH,
    ),
    (
        "kimi",
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{RAW}"
        "<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "",
        BOTH,
    ),
    (
        "function_gemma",
        '<start_function_call>call:get_weather{city:<escape>Paris "75"<escape>,days:3}<end_function_call>'
        "<start_function_call>call:now{}<end_function_call>",
        "",
        BOTH,
    ),
    (
        "gemma4",
        '<|tool_call>call:get_weather{city:<|"|>Paris "75"<|"|>,days:[{a:true,b:{}}, null, x y]}<tool_call|>',
        "",
        [("get_weather", {"city": 'Paris "75"', "days": [{"a": True, "b": {}}, None, "x y"]})],
    ),
    (
        "qwen3_coder",
        '<tool_call>\n<function=get_weather>\n<parameter=city>\nParis "75"\n</parameter>\n<parameter=days>\n3\n'
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "",
        BOTH,
    ),
    (
        "qwen3_coder",
        "<function=get_weather><parameter=city>\na\n\nb\n\n</parameter><parameter=days>many</parameter></function>",
        "",
        [("get_weather", {"city": "a\n\nb\n", "days": "many"})],
    ),
    ("qwen3_coder", f"<function=get_weather>\n{RAW}\n</function>\n<function=now>{{}}</function>", "", BOTH),
    (
        "glm",
        'Now.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris "75"</arg_value>\n'
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        "Now.",
        BOTH,
    ),
    (
        "minimax",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris "75"</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        "",
        BOTH,
    ),
    (
        "generic_json",
        f'{{"tool_calls": [{{"name": "get_weather", "arguments": {RAW}}}, {{"name": "now", "arguments": {{}}}}]}}',
        "",
        BOTH,
    ),
    ("generic_json", f'Sure:\n```json\n{{"name": "get_weather", "arguments": {RAW}}}\n```', "Sure:", BOTH[:1]),
    ("generic_json", f'[{{"name": "get_weather", "arguments": {RAW}}}]', "", BOTH[:1]),
    ("generic_json", f'<tool_call>\n{{"name": "get_weather", "arguments": {RAW}}}\n</tool_call>', "", BOTH[:1]),
    ("generic_json", '{"tool_calls": []}', '{"tool_calls": []}', []),
    (
        "harmony",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather"
        f" <|constrain|>json<|message|>{RAW}<|call|><|start|>assistant to=functions.now<|channel|>commentary json"
        "<|message|>{}",
        "I look.",
        BOTH,
    ),
]
FORMATS = sorted({name for name, *_ in FIXTURES})


def the_format(name: str) -> AnswerFormat:
    return AnswerFormat(tool_format=name, tools=TOOLS)


def told(parts: list[Part]) -> tuple[str, list[tuple[str, object]]]:
    """The text and the calls, with their arguments read."""
    text, calls = "", list[tuple[str, str]]()
    for part in parts:
        match part:
            case CallPart(number, name):
                assert number == len(calls)
                calls.append((name, ""))
            case ArgumentsPart(number, arguments):
                assert number == len(calls) - 1
                calls[number] = (calls[number][0], calls[number][1] + arguments)
            case _:
                text += part.text
    return text, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize(("name", "text", "said", "calls"), FIXTURES)
def test_calls_are_read(name: str, text: str, said: str, calls: list[tuple[str, object]]) -> None:
    assert told(parts_of(the_format(name), [text])) == (said, calls)


@pytest.mark.parametrize(("name", "text", "said", "calls"), FIXTURES)
def test_every_cut_gives_the_same_parts(name: str, text: str, said: str, calls: object) -> None:
    """With `--hypothesis-profile=explore`, 10,000 random cuts of all fixtures."""
    whole = parts_of(the_format(name), [text])
    assert parts_of(the_format(name), list(text)) == whole
    for pieces in random_cuts(text, cases(20, exploring=10_000 // len(FIXTURES) + 1), seed=len(text)):
        assert parts_of(the_format(name), pieces) == whole


@pytest.mark.parametrize(("name", "text", "said", "calls"), FIXTURES)
def test_an_answer_may_be_cut_off_anywhere(name: str, text: str, said: str, calls: list[tuple[str, object]]) -> None:
    """A call that was cut off has arguments that are no JSON, or those of its beginning; it is never a whole one."""
    for end in range(len(text)):
        parts = parts_of(the_format(name), [text[:end]])
        assert parts_of(the_format(name), list(text[:end])) == parts
        begun = [part.name for part in parts if isinstance(part, CallPart)]
        assert begun == [name for name, _ in calls][: len(begun)]
        for number, (_, arguments) in enumerate(calls[: len(begun)]):
            written = "".join(p.text for p in parts if isinstance(p, ArgumentsPart) and p.number == number)
            try:
                assert json.loads(written) == arguments
            except ValueError:
                assert number == len(begun) - 1


MARKS = {
    name: sorted({"{", "}", "[", "]", '"', "name", "now", '{"name": "now"', "(", ")", "a=1", "call:now{", "\n"})
    + sorted({*new_tool_format(name, TOOLS).begins, *new_tool_format(name, TOOLS).tokens} - {""})
    if name != "harmony"
    else ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "analysis", " to=functions.now", "final", "{}", "x"]
    for name in FORMATS
}


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_that_a_model_writes_raises(name: str) -> None:
    for text in {text for fixture, text, _, calls in FIXTURES if fixture == name and calls}:
        for written in harmed(text):
            parts = parts_of(the_format(name), [written])
            msgspec.json.encode(parts)
            if len(written) < 300:
                assert parts_of(the_format(name), list(written)) == parts


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>', []),
        (r'<tool_call>{"name": "now", "arguments": "{\"a\": \"\ud800\"}"}</tool_call>', r'{"a": "\ud800"}'),
        (r'<tool_call>{"name": "now", "arguments": "{\"a\": \"\ud83d\ude00\"}"}</tool_call>', '{"a": "😀"}'),
    ],
)
def test_half_a_character_stays_an_escape_and_is_no_name(text: str, told: str | list[str]) -> None:
    arguments = [part.text for part in parts_of(the_format("hermes"), [text]) if isinstance(part, ArgumentsPart)]
    assert arguments == ([told] if isinstance(told, str) else told)


@pytest.mark.parametrize("name", ["llama3_json", "pythonic", "generic_json"])
@pytest.mark.parametrize(
    "text", ['{"city": "Rome", "name": 1}', '{"type": "x", "city": 1}', '{"name": "Rome", "a": 1}']
)
def test_text_that_is_json_does_not_wait_for_its_end(name: str, text: str) -> None:
    parser = new_parser(the_format(name))
    first = next(index for index, character in enumerate(text) if parser.push(character))
    assert first < 24
    assert parts_of(the_format(name), list(text)) == [TextPart(text)]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=cases(50, exploring=1000), deadline=None)
@given(data=st.data())
def test_garbage_around_marks_is_read_alike_in_every_cut(name: str, data: st.DataObject) -> None:
    pieces = data.draw(st.lists(st.one_of(st.sampled_from(MARKS[name]), st.text(max_size=3)), max_size=15))
    text = "".join(pieces)
    cuts = data.draw(st.sets(st.integers(1, max(1, len(text)))))
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = parts_of(the_format(name), [text])
    assert parts_of(the_format(name), [text[low:high] for low, high in pairwise(bounds)]) == parts
    if not any(isinstance(part, CallPart) for part in parts) and name != "harmony":
        assert "".join(part.text for part in parts) == text


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "harmony"])
def test_what_is_no_call_is_text_with_its_marks(name: str) -> None:
    for mark in new_tool_format(name, TOOLS).begins:
        text = f"Look: {mark} and {mark}that is it"
        assert parts_of(the_format(name), list(text)) == [TextPart(text)]


@pytest.mark.parametrize("name", FORMATS)
def test_a_reader_keeps_no_more_text_for_longer_arguments(name: str) -> None:
    """So the cost of a token does not grow with the arguments: a reader looks at the text that it keeps."""
    text = next(text for fixture, text, _, calls in FIXTURES if fixture == name and calls and "Paris" in text)
    before, after = text.split("Paris", 1)
    text = before + "Pa ris\n"[:6] * 10_000 + after
    parser = new_parser(the_format(name))
    kept = []
    for start in range(0, len(text), 4):
        parser.push(text[start : start + 4])
        if start % 4_000 == 0:
            kept.append(kept_characters(parser))
    parser.flush()
    assert max(kept) < min(kept) + 1_000
