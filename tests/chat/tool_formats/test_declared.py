"""Answers read by a response template that the checkpoint declares."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from answer_cuts import TOOLS, harmed, parts_of, random_cuts
from exploring import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_parsing import parse_response

from serve_app.chat.answers import AnswerFormat, AnswerFormats, new_parser
from serve_app.chat.options import ChatOptions, Tool
from serve_app.chat.parts import ArgumentsPart, CallPart, ReasoningPart, TextPart

QWEN: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
    },
}
"""Templates of these shapes are among transformers' own (cli/serving/utils.py)."""
XML: dict[str, Any] = {
    **QWEN,
    "fields": {
        **QWEN["fields"],
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}
GEMMA: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": ["<turn|>", "<|tool_response>", "<eos>"], "content": "text"},
    },
}
ANSWERS = [
    (
        QWEN,
        "<think>\nHm.\n</think>\n\nI look.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    (
        XML,
        "<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n"
        "</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    (
        GEMMA,
        '<|channel>thought\nHm.<channel|>I look.<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>",
    ),
]


def declared(template: dict[str, Any], prefix: str = "", **changes: Any) -> AnswerFormat:
    fields = {"declared": json.dumps(template), "prefix": prefix, "tools": TOOLS, **changes}
    return AnswerFormat(**fields)


@pytest.mark.parametrize(("template", "text"), ANSWERS)
def test_an_answer_is_read_as_transformers_reads_it(template: dict[str, Any], text: str) -> None:
    parts = parts_of(declared(template), [text])
    assert parts[:3] == [ReasoningPart("Hm."), TextPart("I look."), CallPart(0, "get_weather")]
    assert parts[4:] == [CallPart(1, "now"), ArgumentsPart(1, "{}")]
    assert isinstance(parts[3], ArgumentsPart)
    assert json.loads(parts[3].text) == {"city": "Paris", "days": 3}
    theirs = parse_response(text, template, prefix="")
    assert (theirs["reasoning_content"], theirs["content"]) == ("Hm.", "I look.")
    assert [call["function"]["name"] for call in theirs["tool_calls"]] == ["get_weather", "now"]


@pytest.mark.parametrize(("template", "text"), ANSWERS)
def test_every_cut_gives_the_same_parts(template: dict[str, Any], text: str) -> None:
    whole = parts_of(declared(template), [text])
    assert parts_of(declared(template), list(text)) == whole
    for pieces in random_cuts(text, cases(20, exploring=1_000), seed=1):
        assert parts_of(declared(template), pieces) == whole


MARKS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "</function>", "\n", "  ", "{", "}", "a"),
    *(
        '{"name": "now"',
        "<|im_end|>",
        "<|tool_call>call:f",
        '<|"|>',
        "<tool_call|>",
        "<|channel>thought\n",
        "<channel|>",
    ),
]


@pytest.mark.parametrize("template", [QWEN, XML, GEMMA])
@settings(max_examples=cases(50, exploring=1000), deadline=None)
@given(
    pieces=st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=3)), max_size=12),
    cuts=st.sets(st.integers(1, 80)),
)
def test_garbage_is_read_alike_in_every_cut(template: dict[str, Any], pieces: list[str], cuts: set[int]) -> None:
    text = "".join(pieces)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = parts_of(declared(template), [text[low:high] for low, high in pairwise(bounds)])
    assert parts == parts_of(declared(template), [text])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (QWEN, "a <tool_call>no call</tool_call> b"),
        (XML, "a <tool_call><function=f"),
        (GEMMA, "a <|tool_call>call:f{{<tool_call|> b"),
    ],
)
def test_what_can_not_be_read_is_text(template: dict[str, Any], text: str) -> None:
    assert parts_of(declared(template), list(text)) == [TextPart(text)]


def test_without_tools_a_call_is_text_and_without_reasoning_so_is_that() -> None:
    text = '<think>Hm.</think>\n<tool_call>{"name": "now"}</tool_call>'
    assert parts_of(declared(QWEN, tools={}, split_reasoning=False), list(text)) == [TextPart(text)]


def test_the_arguments_of_json_come_as_they_come() -> None:
    parser = new_parser(declared(QWEN))
    assert parser.push('<tool_call>{"name": "get_weather", "argu') == [CallPart(0, "get_weather")]
    assert parser.push('ments": {"city": "P') == [ArgumentsPart(0, '{"city": "P')]


def test_the_prompt_may_have_begun_the_answer() -> None:
    formats = AnswerFormats("", [], declared=QWEN)
    options = ChatOptions(tools=(Tool("now"),))
    begun = formats.of("Hi<|im_end|>\n<|im_start|>assistant\n<think>\n", options)
    assert begun is not None
    assert parts_of(begun, ["Hm.\n</th", "ink>\n\nYes."]) == [ReasoningPart("Hm."), TextPart("Yes.")]
    closed = formats.of("<|im_start|>assistant\n<think>\n\n</think>\n\n", options)
    assert closed is not None
    assert parts_of(closed, ["Yes."]) == [TextPart("Yes.")]


def test_special_tokens_that_it_names_are_shown() -> None:
    formats = AnswerFormats("", ["<|im_end|>", "<|tool_call>", "<|other|>", "<think>"], declared=QWEN)
    answer = formats.of("", ChatOptions())
    assert answer is not None
    assert answer.shown_tokens == ("<think>", "<|im_end|>")
    gemma = AnswerFormats("", ["<|tool_call>", "<|other|>"], declared=GEMMA).of("", ChatOptions())
    assert gemma is not None
    assert gemma.shown_tokens == ("<|tool_call>",)


def test_a_set_format_comes_before_what_is_declared() -> None:
    answer = AnswerFormats("</think>", [], declared=QWEN, tool_format="none").of("", ChatOptions())
    assert answer is not None
    assert (answer.declared, answer.reasoning_end) == ("", "</think>")


@pytest.mark.parametrize(("template", "text"), ANSWERS)
def test_long_arguments_are_read_in_small_pieces(template: dict[str, Any], text: str) -> None:
    """400 kB in pieces of four characters. A quadratic reader would take minutes."""
    before, after = text.split("Paris", 1)
    city = "Pa ris" * 66_000
    text = before + city + after
    parser = new_parser(declared(template))
    parts = [part for start in range(0, len(text), 4) for part in parser.push(text[start : start + 4])]
    parts += parser.flush()
    assert city in "".join(part.text for part in parts if isinstance(part, ArgumentsPart))


@pytest.mark.parametrize(("template", "text"), ANSWERS)
def test_nothing_that_a_model_writes_raises(template: dict[str, Any], text: str) -> None:
    for written in harmed(text):
        parts = parts_of(declared(template), [written])
        msgspec.json.encode(parts)
        for part in parts:
            if isinstance(part, ArgumentsPart) and template is GEMMA and part.text.startswith("{"):
                json.loads(part.text, parse_constant=pytest.fail)
