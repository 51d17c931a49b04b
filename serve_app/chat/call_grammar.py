"""Grammars of tool calls, for calls that are forced and for tools that are strict.

Promises that the arguments of a call that matches validate against its tool's schema. A format whose arguments are no
JSON takes calls as JSON between its own marks, too, and its grammar asks for that. Knows no wire format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve_app.chat.options import Tool
from serve_app.chat.tool_formats.choice import GENERIC, HARMONY


@dataclass(frozen=True, slots=True)
class CallForm:
    """How calls are written: `begin`, then each call as `before`, its name, `name_end`, its arguments and `after`.

    With `numbered`, a colon and the call's number follow the name.
    """

    before: str
    name_end: str
    after: str
    between: str
    begin: str = ""
    end: str = ""
    mark: str = ""
    """What the calls begin with, where text can stand before them. Empty: calls are the whole answer."""
    numbered: bool = False


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
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "",
        begin="<|tool_calls_section_begin|>",
        end="<|tool_calls_section_end|>",
        mark="<|tool_calls_section_begin|>",
        numbered=True,
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


_QWEN_FUNCTION = CallForm("<function=", ">\n", "\n</function>", "", mark="<function=")


def call_forms(tool_format: str, template: str) -> list[CallForm]:
    """How a model with this chat template writes calls in a format: first the usual way, then those that the format's
    parser reads, too. There is one for each mark in the parser's `begins`."""
    form = call_form(tool_format, template)
    match tool_format:
        case "qwen3_coder":
            return [form, _QWEN_FUNCTION]
        case "deepseek" | "kimi":  # calls without a section around them
            return [form, replace(form, begin="", end="", mark=f"{form.before.partition('>')[0]}>")]
        case "llama3_json":
            return [form, _after("<|python_tag|>", form)]
        case "pythonic":
            return [form, _after("<|python_start|>", form), _after("<|python_tag|>", form)]
    return [form]


def _after(mark: str, form: CallForm) -> CallForm:
    return replace(form, begin=mark, mark=mark)


def call_form(tool_format: str, template: str) -> CallForm:
    """The usual way in which a model with this chat template writes calls in a format."""
    if tool_format == "mistral" and "[ARGS]" in template:
        return _MISTRAL_V11
    if tool_format == "deepseek" and "```json" in template:
        return _DEEPSEEK_V3
    return _FORMS[tool_format]


_ANY = "/(?s:.*)/"


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

    def up_to(self, rule: str, mark: str, text: str = _ANY) -> list[str]:
        """Rules by which `rule` matches a text up to and with the first `mark`. `text`: a regular expression."""
        lazy = f"{rule}_text[lazy]: {text} {_quoted(mark)}"
        if mark not in self._ids:
            return [f"{rule}: {rule}_text", lazy]
        return [f"{rule}: {text} <[{self._ids[mark]}]> | {rule}_text", lazy]


def calls_grammar(
    form: CallForm, tools: Sequence[Tool], texts: GrammarTexts, schema: Callable[[Tool], Any], *, several: bool
) -> str:
    """Calls and nothing else, in Lark's syntax. `schema`: of a tool's arguments. `several`: there may be more."""
    calls = _calls("calls", form, tools, texts, several=several)
    return "\n".join(["start: calls", *calls, *_arguments(tools, schema)])


def text_and_calls_grammar(
    forms: Sequence[CallForm],
    tools: Sequence[Tool],
    texts: GrammarTexts,
    schema: Callable[[Tool], Any],
    *,
    reasoning: str = "",
) -> str:
    """Any text, in which the marks of the forms begin calls, in Lark's syntax.

    `reasoning`: a mark that a parser looks for where it looks for calls that have no mark.
    """
    bare = [form for form in forms if not form.mark]
    no_first = re.escape("{[" + reasoning[:1])
    text = rf"/\s*([^\s{no_first}](?s:.*))?/" if bare else _ANY
    rules: list[str] = []
    begun: list[str] = []
    for index, form in enumerate(form for form in forms if form.mark):
        begun.append(f"begun_{index} marked_{index}")
        rules += texts.up_to(f"begun_{index}", form.mark, text)
        rules += _calls(f"marked_{index}", form, tools, texts, several=bool(form.begin), skipped=form.mark)
    for form in bare:
        rules += _calls("bare", form, tools, texts, several=True)
    start = f"start: {'bare | ' if bare else ''}({' | '.join(begun)})* {text}"
    return "\n".join([start, *rules, *_arguments(tools, schema)])


def _calls(
    rule: str, form: CallForm, tools: Sequence[Tool], texts: GrammarTexts, *, several: bool, skipped: str = ""
) -> list[str]:
    """Rules by which `rule` matches calls; `skipped`: what stands before them already."""
    first = (form.begin + form.before).removeprefix(skipped)
    more = f"({texts.literal(form.between)} {texts.literal(form.before)} {rule}_named)*" if several else ""
    named = " | ".join(f"{rule}_{index}" for index in range(len(tools)))
    rules = [f"{rule}: {texts.literal(first)} {rule}_named {more} {texts.literal(form.end)}", f"{rule}_named: {named}"]
    for index, tool in enumerate(tools):
        start = texts.literal(tool.name + form.name_end)
        if form.numbered:
            start = f"{texts.literal(tool.name)} /:[0-9]{{1,2}}/ {texts.literal(form.name_end)}"
        rules.append(f"{rule}_{index}: {start} arguments_{index} {texts.literal(form.after)}")
    return rules


def _arguments(tools: Sequence[Tool], schema: Callable[[Tool], Any]) -> list[str]:
    return [f"arguments_{index}: %json {json.dumps(schema(tool))}" for index, tool in enumerate(tools)]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
