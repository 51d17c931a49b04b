"""Which format an answer is read in: what the template shows, what the config says, and what the request offers."""

from __future__ import annotations

import msgspec
import pytest

from serve_app.chat.answers import AnswerFormat, AnswerFormats
from serve_app.chat.options import ChatOptions, Tool, ToolChoice
from serve_app.chat.tool_formats import harmony
from serve_app.chat.tool_formats.choice import reasoning_format_of, tool_format_of
from serve_app.config import ChatConfig

TOOL = Tool("f", "", {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {}}})
WITH_TOOL = ChatOptions(tools=(TOOL,))
QWEN = "{{ tools }}<tool_call></tool_call><think></think>"
GPT_OSS = "{{ tools }}<|start|>assistant<|channel|>analysis<|message|>"


@pytest.mark.parametrize(
    ("template", "tool_format", "reasoning"),
    [
        (QWEN, "hermes", "think"),
        ("<tool_call><function=x><parameter=y>", "qwen3_coder", ""),
        ("<tool_call>{name}<arg_key></think>", "glm", "think"),
        ("[TOOL_CALLS][ARGS][THINK][/THINK]", "mistral", "mistral"),
        ("<｜tool▁calls▁begin｜></think>", "deepseek", "think"),
        ("<|python_tag|><|start_header_id|>", "llama3_json", ""),
        ("[func_name1(params_name1=params_value1)]<|start_header_id|>", "pythonic", ""),
        ("<|tool_call>call:<|channel>thought<channel|>", "gemma4", "gemma4"),
        (GPT_OSS, "harmony", ""),
        ("plain", "generic_json", ""),
    ],
)
def test_a_template_shows_its_formats(template: str, tool_format: str, reasoning: str) -> None:
    assert (tool_format_of(template), reasoning_format_of(template)) == (tool_format, reasoning)


def test_only_a_request_with_tools_has_calls() -> None:
    formats = AnswerFormats(QWEN, [])
    answer = formats.of("<|im_start|>assistant\n", WITH_TOOL)
    assert answer is not None
    assert (answer.tool_format, answer.tools) == ("hermes", {"f": {"a": True, "b": False, "c": False}})
    for options in (ChatOptions(), ChatOptions(tools=(TOOL,), tool_choice=ToolChoice("none"))):
        assert formats.of("", options) == AnswerFormat("</think>", "<think>")
    assert formats.of("<think>\n\n</think>\n\n", ChatOptions()) is None
    assert formats.of("", ChatOptions(split_reasoning=False)) is None


def test_a_template_without_tools_gets_calls_in_the_form_that_the_prompt_asks_for() -> None:
    formats = AnswerFormats("<｜tool▁calls▁begin｜>", [], shows_tools=False)
    answer = formats.of("", WITH_TOOL)
    assert answer is not None
    assert answer.tool_format == "generic_json"
    forced = formats.of("", ChatOptions(tools=(TOOL,), tool_choice=ToolChoice("required")))
    assert forced is not None
    assert forced.tool_format == "hermes"


def test_channels_are_read_also_without_tools() -> None:
    tokens = ["<|channel|>", "<|message|>", "<|end|>", "<|other|>"]
    for settings in ({}, {"tool_format": "none"}):
        answer = AnswerFormats(GPT_OSS, tokens, **settings).of("", ChatOptions())
        assert answer is not None
        assert (answer.tool_format, answer.tools, answer.end_tokens) == ("harmony", {}, harmony.END_TOKENS)
        assert answer.shown_tokens == ("<|channel|>", "<|end|>", "<|message|>")


def test_one_call_where_the_request_wants_one() -> None:
    formats = AnswerFormats(QWEN, [])
    for options in (
        ChatOptions(tools=(TOOL,), parallel_tool_calls=False),
        ChatOptions(tools=(TOOL,), tool_choice=ToolChoice("named", "f")),
    ):
        answer = formats.of("", options)
        assert answer is not None
        assert answer.single_call


def test_every_format_of_the_config_can_be_used_and_sent_to_another_process() -> None:
    for field in ("tool_format", "reasoning_format"):
        names = ChatConfig.model_fields[field].annotation.__args__  # type: ignore[union-attr]
        for name in names:
            answer = AnswerFormats(QWEN, ["<|channel|>"], **{field: name}).of("", WITH_TOOL)
            assert answer is not None
            assert msgspec.json.decode(msgspec.json.encode(answer), type=AnswerFormat) == answer
