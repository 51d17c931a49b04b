"""What is found out about templates, and the prompts that come of it: the ids of transformers for ordinary chats."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from exploring import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import CHATML
from tool_templates import FAMILIES, GEMMA, HARMONY, HERMES, LLAMA, MISTRAL, tool_backend
from transformers import AutoTokenizer

from serve_app.chat.conversation import ChatMessage
from serve_app.chat.options import ChatOptions, Tool
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.template_style import TemplateStyle, template_message, template_tool
from serve_app.chat.templates import ChatTemplate
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.chat.tool_calls import ToolCall

STYLES = {
    "hermes": {"shows_tools", "shows_calls", "shows_results", "shows_reasoning", "takes_system"},
    "llama": {"shows_tools", "shows_calls", "shows_results", "takes_system", "one_call"},
    "mistral": {"shows_tools", "shows_calls", "shows_results", "takes_system", "short_ids"},
    "deepseek": {"shows_calls", "shows_results", "takes_system", "text_arguments", "null_content"},
    "harmony": {"shows_tools", "shows_calls", "shows_results", "shows_reasoning", "takes_system", "one_call"},
    "gemma": {"shows_tools", "shows_calls", "shows_results", "takes_system"},
    "pythonic": {"shows_tools", "shows_calls", "shows_results", "takes_system"},
    "shown": {"shows_tools", "shows_calls", "shows_results", "takes_system", "text_arguments"},
}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": 'The city, e.g. "Rome" & <others>'},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "where": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
        "days": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["city"],
}
TOOLS = (
    Tool("get_weather", "The weather, now > then.", SCHEMA),
    Tool("naïve", "", {"type": "object", "properties": {}}),
)


def call(number: int, **arguments: Any) -> ToolCall:
    return ToolCall(f"abcdefg{number:02}", "get_weather", arguments, json.dumps(arguments, ensure_ascii=False))


def result(number: int, text: str) -> ChatMessage:
    return ChatMessage("tool", text, "get_weather", tool_call_id=f"abcdefg{number:02}")


CHAT = [
    ChatMessage("system", "Be brief."),
    ChatMessage("user", "Rome & Größe?"),
    ChatMessage("assistant", "", reasoning="Hm.", tool_calls=(call(0, city="Rome", days=[1, 2], where={"x": 1.5}),)),
    result(0, '{"t": 21, "sky": "<blue>"}'),
    ChatMessage("user", "And?"),
]


@pytest.fixture(scope="session")
def family_folder(save_tokenizer: Callable[..., Path]) -> Callable[[str], Path]:
    return cache(
        lambda template: save_tokenizer(
            tool_backend(), template, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
        )
    )


@pytest.fixture(scope="session")
def family(family_folder: Callable[[str], Path]) -> Callable[[str], ChatTemplate]:
    return cache(lambda template: ChatTemplate(ChatTokenizer.load(family_folder(template))))


Family = Callable[[str], ChatTemplate]


def shown(template: ChatTemplate, messages: list[ChatMessage], **options: Any) -> str:
    return template._tokenizer.shown(template.encode(messages, ChatOptions(**options)))


@cache
def transformers_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def oracle(folder: Path, messages: list[ChatMessage], tools: tuple[Tool, ...], style: TemplateStyle) -> list[int]:
    """transformers' own, with its own defence."""
    seen = [dict(template_message(message, style)) for message in messages]
    return transformers_tokenizer(folder).apply_chat_template(
        seen,
        tools=[dict(template_tool(tool)) for tool in tools] or None,
        add_generation_prompt=True,
        return_dict=False,
        sanitize_control_tokens=True,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_style_of_each_family_is_found(family: Family, name: str) -> None:
    style = family(FAMILIES[name])._style
    assert {field for field in TemplateStyle.__slots__ if getattr(style, field)} == STYLES[name]


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"deepseek"}))  # it shows no tools, and wants a null content
def test_the_ids_are_those_of_transformers(family: Family, family_folder: Callable[[str], Path], name: str) -> None:
    template = family(FAMILIES[name])
    ids = template.encode(CHAT, ChatOptions(tools=TOOLS))
    assert ids == oracle(family_folder(FAMILIES[name]), CHAT, TOOLS, template._style)


plain = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cn", "Co")), max_size=12)
texts = plain | st.sampled_from(["<|im_end|>", "a<tool_call>b", "1 < 2 > 1 & 'x' \"y\" \\", "x\n{{ y }}"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", ["hermes", "mistral", "harmony"])
@settings(deadline=None, max_examples=cases(20, exploring=200))
@given(arguments=st.dictionaries(plain, values, max_size=3), answer=texts, description=texts, enum=st.lists(texts))
def test_so_are_those_of_any_ordinary_tools(
    family: Family,
    family_folder: Callable[[str], Path],
    name: str,
    arguments: dict[str, Any],
    answer: str,
    description: str,
    enum: list[str],
) -> None:
    template = family(FAMILIES[name])
    tools = (Tool("f", description, {"type": "object", "properties": {"a": {"type": "string", "enum": enum}}}),)
    chat = [CHAT[1], ChatMessage("assistant", "", tool_calls=(call(0, **arguments),)), result(0, answer), CHAT[1]]
    ids = template.encode(chat, ChatOptions(tools=tools))
    assert ids == oracle(family_folder(FAMILIES[name]), chat, tools, template._style)


def test_ids_are_made_short_where_the_template_wants_it(family: Family) -> None:
    calls = tuple(ToolCall(f"call_{n}", "f", {}, "{}") for n in range(2))
    results = [ChatMessage("tool", "x", tool_call_id=made.id) for made in calls]
    text = shown(family(MISTRAL), [CHAT[1], ChatMessage("assistant", "", tool_calls=calls), *results])
    first, second = (text.partition(f'"{key}": "')[2][:9] for key in ("id", "call_id"))
    assert first == second
    assert first.isalnum()
    assert text.count(first) == 2
    kept = shown(family(MISTRAL), [CHAT[1], ChatMessage("assistant", "", tool_calls=(call(7),)), result(7, "x")])
    assert kept.count('id": "abcdefg07"') == 2


@pytest.mark.parametrize("template", [LLAMA, HARMONY])
def test_several_calls_are_shown_one_by_one(family: Family, template: str) -> None:
    both = ChatMessage("assistant", "", tool_calls=(call(0, city="Rome"), call(1, city="Oslo")))
    text = shown(family(template), [CHAT[1], both, result(1, "snow"), result(0, "sun")], tools=TOOLS)
    places = [text.index(word) for word in ("Rome", "sun", "Oslo", "snow")]
    assert places == sorted(places)


def test_a_result_has_the_name_of_its_call(family: Family) -> None:
    chat = [
        CHAT[1],
        ChatMessage("assistant", "", tool_calls=(call(0),)),
        ChatMessage("tool", "x", tool_call_id="abcdefg00"),
    ]
    assert "response:get_weather(" in shown(family(GEMMA), chat)


def test_a_result_that_the_template_does_not_take_is_refused_in_its_words(family: Family) -> None:
    with pytest.raises(PromptError, match="no previous tool call"):
        family(HARMONY).encode([CHAT[1], result(0, "x")], ChatOptions(tools=TOOLS))


def test_reasoning_goes_where_the_template_has_a_place_for_it(family: Family) -> None:
    assert "<think>Hm.</think>" in shown(family(HERMES), CHAT)
    assert "analysis\nHm.<|im_end|>" in shown(family(HARMONY), CHAT)


def test_a_template_of_its_own_for_tools_is_used_with_tools(save_tokenizer: Callable[..., Path]) -> None:
    """As Command-R and Hermes 2 have it; theirs fail without tools."""
    needs_tools = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + HERMES
    named: Any = {"default": CHATML, "tool_use": needs_tools}
    folder = save_tokenizer(tool_backend(), named, eos_token="<|im_end|>")
    template = ChatTemplate(ChatTokenizer.load(folder))
    assert template.shows_tools
    assert shown(template, CHAT[:2]) == shown(ChatTemplate(ChatTokenizer.load(folder, template=CHATML)), CHAT[:2])
    assert '"name": "get_weather"' in shown(template, CHAT, tools=TOOLS)
    assert "<tool_call>" in template._tokenizer.control_tokens


def test_a_macro_that_recurses_without_end_is_a_refusal(family_folder: Callable[[str], Path]) -> None:
    endless = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{% if tools %}{{ f(1) }}{% endif %}" + CHATML
    template = ChatTemplate(ChatTokenizer.load(family_folder(endless)))
    template._style = TemplateStyle(shows_tools=True)
    with pytest.raises(PromptError, match="fails on these messages"):
        template.encode(CHAT[:2], ChatOptions(tools=TOOLS))
