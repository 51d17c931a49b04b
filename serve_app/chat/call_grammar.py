"""Grammars of tool calls, for calls that are forced and for tools that are strict.

Promises that the arguments of a call that matches validate against its tool's schema. A format whose arguments are no
JSON takes calls as JSON between its own marks, too, and its grammar asks for that. Knows no wire format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.chat.options import Tool
from serve_app.chat.tool_formats.choice import GENERIC, HARMONY


@dataclass(frozen=True, slots=True)
class CallForm:
    """How calls are written: `begin`, then each call as `before`, its name, `name_end`, its arguments and `after`."""

    before: str
    name_end: str
    after: str
    between: str
    begin: str = ""
    end: str = ""
    mark: str = ""
    """What the calls begin with, where text can stand before them. Empty: calls are the whole answer."""


def _json_between(start: str, end: str, between: str = "") -> CallForm:
    return CallForm(f'{start}{{"name": "', '", "arguments": ', f"}}{end}", between, mark=start.rstrip("\n"))


_HERMES = _json_between("<tool_call>\n", "\n</tool_call>", "\n")
_FORMS: Mapping[str, CallForm] = {
    "hermes": _HERMES,
    GENERIC: _HERMES,
    "qwen3_coder": _HERMES,
    "glm": _HERMES,
    "minimax": _json_between("<minimax:tool_call>\n", "\n</minimax:tool_call>", "\n"),
    "function_gemma": _json_between("<start_function_call>", "<end_function_call>"),
    "gemma4": _json_between("<|tool_call>", "<tool_call|>"),
    "tool_code": _json_between("```tool_code\n", "\n```", "\n"),
    "llama3_json": CallForm('{"name": "', '", "parameters": ', "}", "; "),
    "pythonic": CallForm('{"name": "', '", "arguments": ', "}", "; "),
    "mistral": CallForm(
        '{"name": "', '", "arguments": ', "}", ", ", begin="[TOOL_CALLS][", end="]", mark="[TOOL_CALLS]"
    ),
    "deepseek": CallForm(
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "",
        begin="<｜tool▁calls▁begin｜>",
        end="<｜tool▁calls▁end｜>",
        mark="<｜tool▁calls▁begin｜>",
    ),
    "kimi": CallForm(
        "<|tool_call_begin|>functions.",
        ":0<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "",
        begin="<|tool_calls_section_begin|>",
        end="<|tool_calls_section_end|>",
        mark="<|tool_calls_section_begin|>",
    ),
    HARMONY: CallForm("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "", ""),
}
_MISTRAL_V11 = CallForm("[TOOL_CALLS]", "[ARGS]", "", "", mark="[TOOL_CALLS]")
_DEEPSEEK_V3 = CallForm(
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "\n```json\n",
    "\n```<｜tool▁call▁end｜>",
    "\n",
    begin="<｜tool▁calls▁begin｜>",
    end="<｜tool▁calls▁end｜>",
    mark="<｜tool▁calls▁begin｜>",
)


def call_form(tool_format: str, template: str) -> CallForm:
    """How a model with this chat template writes calls in a format."""
    if tool_format == "mistral" and "[ARGS]" in template:
        return _MISTRAL_V11
    if tool_format == "deepseek" and "```json" in template:
        return _DEEPSEEK_V3
    return _FORMS[tool_format]


class GrammarTexts:
    """Writes texts for Lark's syntax, as llguidance reads it. A token of its own name matches, and so does its text.

    llguidance never matches an added token by its bytes, special or not.
    """

    def __init__(self, added_tokens: Mapping[str, int]) -> None:
        """`added_tokens`: name -> id."""
        self._ids = {name: token_id for name, token_id in added_tokens.items() if name.strip()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def literal(self, text: str) -> str:
        """An expression that matches a text; empty for the empty one."""
        parts: list[str] = []
        at = 0
        for found in self._pattern.finditer(text):
            parts += [_quoted(text[at : found.start()]), f"(<[{self._ids[found[0]]}]> | {_quoted(found[0])})"]
            at = found.end()
        return " ".join(part for part in (*parts, _quoted(text[at:])) if part)

    def up_to(self, rule: str, mark: str) -> list[str]:
        """Rules by which `rule` matches any text up to and with the first `mark`."""
        lazy = f"{rule}_text[lazy]: /(?s:.*)/ {_quoted(mark)}"
        if mark not in self._ids:
            return [f"{rule}: {rule}_text", lazy]
        return [f"{rule}: /(?s:.*)/ <[{self._ids[mark]}]> | {rule}_text", lazy]


def calls_grammar(
    form: CallForm, tools: Sequence[Tool], texts: GrammarTexts, schema: Callable[[Tool], Any], *, several: bool
) -> str:
    """Calls and nothing else, in Lark's syntax. `schema`: of a tool's arguments. `several`: there may be more."""
    return "\n".join(["start: calls", *_calls(form, form.begin, tools, texts, schema, several=several)])


def text_and_calls_grammar(
    form: CallForm, tools: Sequence[Tool], texts: GrammarTexts, schema: Callable[[Tool], Any]
) -> str:
    """Any text, in which what the form's mark begins are calls, in Lark's syntax."""
    if not form.mark:
        text = r"text: /([^{\[\s](?s:.*))?/"
        calls = _calls(form, form.begin, tools, texts, schema, several=True)
        return "\n".join(["start: calls | text", text, *calls])
    return "\n".join(
        [
            "start: (begun calls)* /(?s:.*)/",
            *texts.up_to("begun", form.mark),
            *_calls(form, form.begin, tools, texts, schema, several=bool(form.begin), skipped=form.mark),
        ]
    )


def _calls(
    form: CallForm,
    begin: str,
    tools: Sequence[Tool],
    texts: GrammarTexts,
    schema: Callable[[Tool], Any],
    *,
    several: bool,
    skipped: str = "",
) -> list[str]:
    """Rules by which `calls` matches calls; `skipped`: what stands before them already."""
    first = (begin + form.before).removeprefix(skipped)
    more = f"({texts.literal(form.between)} {texts.literal(form.before)} named)*" if several else ""
    rules = [f"calls: {texts.literal(first)} named {more} {texts.literal(form.end)}"]
    rules.append("named: " + " | ".join(f"tool_{index}" for index in range(len(tools))))
    for index, tool in enumerate(tools):
        start = texts.literal(tool.name + form.name_end)
        rules.append(f"tool_{index}: {start} %json {json.dumps(schema(tool))} {texts.literal(form.after)}")
    return rules


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
