"""What an answer must match as a whole: reasoning, then text that matches a grammar, or tool calls, or either.

Promises a grammar of what the parser of the same answer reads as the caller asked. Knows no wire format.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.chat.answers import AnswerFormat
from serve_app.chat.call_grammar import GrammarTexts, call_form, call_forms, calls_grammar, text_and_calls_grammar
from serve_app.chat.grammar import styled_schema
from serve_app.chat.options import ChatOptions, Tool
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.schemas import SchemaError
from serve_app.chat.tool_formats import harmony
from serve_app.chat.tool_formats.choice import HARMONY

_WHITESPACE = r"WHITESPACE: /[ \t\r\n]{1,8}/"
_MESSAGE = f"MESSAGE: /(?s:.*)/ & ~/(?s:.*)({'|'.join(map(re.escape, harmony.NEXT))})(?s:.*)/"
"""The text of a message in harmony's format: nothing in it ends it, also not spelled in ordinary tokens.

`~` alone would match tokens, too."""
_ANALYSIS, _FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
_NEXT_MESSAGE = "<|end|><|start|>assistant"


class Constraints:
    """The grammars of one model's answers."""

    def __init__(self, template: str, added_tokens: Mapping[str, int]) -> None:
        """`template`: the chat template. `added_tokens`: name -> id of the tokens beside the vocabulary's words."""
        self._template = template
        self._texts = GrammarTexts(added_tokens)

    def of(self, options: ChatOptions, answer: AnswerFormat | None) -> str:
        """The grammar of an answer in this format, in the form of `GenerationRequest.constraint`; "" without one.

        Raises `PromptError` for a forced call where calls are text.
        """
        text, calls = options.text_grammar, ""
        forced = options.tool_choice.mode in ("required", "named")
        strict = any(tool.strict for tool in options.tools)
        if not (text or forced or strict):
            return ""
        if answer is not None and answer.tools and answer.tool_format:
            calls = self._calls(options, answer.tool_format)
        if forced and not calls:
            message = "This server reads no tool calls (chat.tool_format), so none can be forced."
            raise PromptError(message, param="tool_choice")
        if forced:
            return self._after_reasoning({"calls": calls}, answer)
        if text and calls:
            return self._after_reasoning({"text": text, "calls": calls}, answer)
        if text:
            return self._after_reasoning({"text": text}, answer)
        if calls and strict and answer is not None:
            return self._lazily(options, calls, answer)
        return ""

    def _calls(self, options: ChatOptions, tool_format: str) -> str:
        choice = options.tool_choice
        tools = [tool for tool in options.tools if choice.mode != "named" or tool.name == choice.name]
        several = options.parallel_tool_calls and choice.mode != "named" and tool_format != HARMONY
        return calls_grammar(call_form(tool_format, self._template), tools, self._texts, _schema, several=several)

    def _lazily(self, options: ChatOptions, calls: str, answer: AnswerFormat) -> str:
        """Free text, and calls that match."""
        if answer.tool_format == HARMONY:
            said = f'({self._literal("<|channel|>")} ("analysis" | "commentary") {self._literal("<|message|>")} MESSAGE'
            said = f"{said} {self._literal(_NEXT_MESSAGE)})*"
            return _grammar([f"start: {said} ({self._literal(_FINAL)} MESSAGE | @calls)", _MESSAGE], {"calls": calls})
        forms = call_forms(answer.tool_format, self._template)
        mixed = text_and_calls_grammar(forms, options.tools, self._texts, _schema, reasoning=answer.reasoning_start)
        return self._after_reasoning({"mixed": mixed}, answer)

    def _after_reasoning(self, parts: Mapping[str, str], answer: AnswerFormat | None) -> str:
        """One of the parts, after reasoning where the answer may have it."""
        one_of = " | ".join(f"@{name}" for name in parts)
        if answer is not None and answer.tool_format == HARMONY:
            one_of = " | ".join(f"@{name}" if name == "calls" else f"{self._literal(_FINAL)} @{name}" for name in parts)
            analysis = f"({self._literal(_ANALYSIS)} MESSAGE {self._literal(_NEXT_MESSAGE)})?"
            return _grammar([f"start: {analysis} ({one_of})", _MESSAGE], parts)
        if answer is None or not answer.reasoning_end:
            return _grammar([f"start: {one_of}"], parts)
        reasoned = f"{self._literal(answer.reasoning_start)} reasoned WHITESPACE?"
        optional = f"({reasoned})?" if answer.reasoning_start else reasoned
        up_to_end = self._texts.up_to("reasoned", answer.reasoning_end)
        return _grammar([f"start: {optional} ({one_of})", *up_to_end, _WHITESPACE], parts)

    def _literal(self, text: str) -> str:
        return self._texts.literal(text)


def _schema(tool: Tool) -> Mapping[str, Any]:
    """What a tool's arguments must validate against, with how the JSON is written. Raises `PromptError`."""
    try:
        return styled_schema({"type": "object", **(tool.parameters or {})})
    except SchemaError as error:
        raise PromptError(f"The parameters of the tool '{tool.name}' can't be used: {error}.", param="tools") from error


def _grammar(rules: Sequence[str], parts: Mapping[str, str]) -> str:
    """A grammar in llguidance's form. The rules, in Lark's syntax, name the parts: `@part`."""
    entries: list[Mapping[str, Any]] = []
    text = "\n".join(rules)
    for part, grammar in parts.items():
        first, *others = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
        name = "g" + hashlib.sha256(grammar.encode(errors="surrogatepass")).hexdigest()[:16]
        text = text.replace(f"@{part}", f"@{name}")
        entries += [{**first, "name": name}, *others]
    unique = {json.dumps(entry): entry for entry in ({"lark_grammar": text}, *entries)}
    return json.dumps({"grammars": list(unique.values())}, allow_nan=False, separators=(",", ":"))
