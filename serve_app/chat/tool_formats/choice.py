"""Which format a model's calls and reasoning have: told by its chat template, or set by the config.

Promises that an equal name means an equal format in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from serve_app.chat.answer_parser import ToolFormat
from serve_app.chat.tool_formats.gemma import FUNCTION_GEMMA, GEMMA_4
from serve_app.chat.tool_formats.json_calls import GenericJson, Hermes, Llama3Json, Mistral
from serve_app.chat.tool_formats.marked_calls import DeepSeek, Kimi
from serve_app.chat.tool_formats.pythonic import Pythonic, ToolCode
from serve_app.chat.tool_formats.xml_calls import GLM, MINIMAX, QWEN3_CODER, ArgumentTypes, XmlCalls

HARMONY = "harmony"
GENERIC = "generic_json"

_FORMATS: Mapping[str, Callable[[ArgumentTypes], ToolFormat]] = {
    "hermes": lambda tools: Hermes(),
    "llama3_json": Llama3Json,
    "pythonic": Pythonic,
    "mistral": lambda tools: Mistral(),
    "deepseek": lambda tools: DeepSeek(),
    "kimi": lambda tools: Kimi(),
    "function_gemma": lambda tools: FUNCTION_GEMMA,
    "gemma4": lambda tools: GEMMA_4,
    "tool_code": ToolCode,
    "qwen3_coder": partial(XmlCalls, "qwen3_coder", QWEN3_CODER),
    "glm": partial(XmlCalls, "glm", GLM),
    "minimax": partial(XmlCalls, "minimax", MINIMAX),
    GENERIC: GenericJson,
}
"""Name -> how to make it from the tools that the request offers."""

_SIGNS = (
    (HARMONY, ("<|channel|>", "<|message|>")),
    ("deepseek", ("<｜tool▁calls▁begin｜>",)),
    ("kimi", ("<|tool_calls_section_begin|>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("gemma4", ("<|tool_call>call:",)),
    ("function_gemma", ("<start_function_call>",)),
    ("minimax", ("<minimax:tool_call>",)),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("glm", ("<arg_key>",)),
    ("hermes", ("<tool_call>",)),
    ("pythonic", ("<|python_start|>",)),
    ("pythonic", ("func_name1(",)),
    ("tool_code", ("```tool_code",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ("<|start_header_id|>", '"parameters"')),
)
"""(format, what a template that uses it contains), the most telling first."""

REASONING: Mapping[str, tuple[str, str]] = {
    "think": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "cohere": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "seed": ("<seed:think>", "</seed:think>"),
    "gemma4": ("<|channel>thought", "<channel|>"),
}
"""Name -> what begins and what ends the reasoning."""


def tool_format_of(template: str) -> str:
    """The name of the format that a chat template shows; the generic one if it shows none."""
    return next((name for name, signs in _SIGNS if all(sign in template for sign in signs)), GENERIC)


def reasoning_format_of(template: str) -> str:
    """The name of the marks of reasoning that a chat template shows; "" if it shows none."""
    return next((name for name, (_, end) in REASONING.items() if end in template), "")


def new_tool_format(name: str, tools: ArgumentTypes) -> ToolFormat:
    """The format of this name for a request that offers these tools."""
    return _FORMATS[name](tools)
