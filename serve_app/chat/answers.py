"""How the text of an answer is read: the format, which travels with its request, and the parser for it.

Promises that an equal format reads an equal text in the same way in every process. Knows no wire format.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from msgspec import Struct
from msgspec.structs import replace

from serve_app.chat.answer_parser import MarkedParser
from serve_app.chat.options import ChatOptions
from serve_app.chat.parts import AnswerParser, Part, ReasoningPart
from serve_app.chat.tool_formats import harmony
from serve_app.chat.tool_formats.choice import (
    GENERIC,
    HARMONY,
    REASONING,
    new_tool_format,
    reasoning_format_of,
    tool_format_of,
)
from serve_app.chat.tool_formats.declared import DeclaredParser, declared_tokens, prefix_of
from serve_app.chat.tool_formats.xml_calls import argument_types


class AnswerFormat(Struct, frozen=True):
    """How one answer's text is read. A request without it has an answer that is text and nothing else."""

    reasoning_end: str = ""
    """What ends the model's reasoning, e.g. `</think>`. Empty: the answer has none, or its format knows."""
    reasoning_start: str = ""
    """What begins it. Empty: the prompt has begun it."""
    tool_format: str = ""
    """The name of the format of tool calls, or `harmony`, which has reasoning, too."""
    tools: Mapping[str, Mapping[str, bool]] = {}
    """The tools that the request offers: name -> argument -> whether its schema makes it a text. Without any, calls
    are text."""
    single_call: bool = False
    """The answer ends with its first call."""
    split_reasoning: bool = True
    """For formats that know the reasoning themselves."""
    calls_first: bool = False
    """The answer is calls or text. What follows text is text, whatever it looks like: its grammar may allow marks."""
    show_reasoning: bool = True
    """False: the answer leaves the reasoning out."""
    declared: str = ""
    """The checkpoint's own response template as JSON. It takes the place of the formats above."""
    prefix: str = ""
    """For `declared`: what the prompt has of the answer already."""
    shown_tokens: tuple[str, ...] = ()
    """Special tokens that the text of the answer has to show: they are marks."""
    end_tokens: tuple[str, ...] = ()
    """Tokens that end the answer, besides EOS."""


class AnswerFormats:
    """The formats of one model's answers."""

    def __init__(
        self,
        template: str,
        skipped_tokens: Collection[str],
        *,
        shows_tools: bool = True,
        declared: Mapping[str, object] | None = None,
        tool_format: str = "auto",
        reasoning_format: str = "auto",
    ) -> None:
        """`template`: the chat template, which shows what marks the model uses. `skipped_tokens`: the special tokens.

        `shows_tools`: the template has a form of its own for tools. `declared`: the checkpoint's response template; it
        is used where both formats are `auto`. "none" is a format, too.
        """
        auto = tool_format == reasoning_format == "auto"
        self._declared = json.dumps(declared) if declared and auto else ""
        self._skipped = frozenset(skipped_tokens)
        self._shows_tools = shows_tools
        shown = tool_format_of(template)
        if tool_format == "auto":
            tool_format = shown if shows_tools else GENERIC
        if reasoning_format == "auto":
            reasoning_format = HARMONY if HARMONY in (shown, tool_format) else reasoning_format_of(template)
        self.tool_format = "" if tool_format == "none" else tool_format
        """The name of the format of tool calls; "" if calls are text."""
        self._reasoning_format = reasoning_format
        self._reasoning = REASONING.get(reasoning_format, ("", ""))

    def of(self, prompt: str, options: ChatOptions) -> AnswerFormat | None:
        """The format of the answer to a chat; None when it is text and nothing else.

        `prompt`: the end of the prompt, with the names of control tokens in it: it may have begun the reasoning, or
        ended it so that there is none.
        """
        answer = self._of(prompt, options)
        if answer is None:
            return None
        return replace(answer, show_reasoning=options.show_reasoning, calls_first=bool(options.text_grammar))

    def _of(self, prompt: str, options: ChatOptions) -> AnswerFormat | None:
        """As `of`, but for what the options say of every format alike."""
        if options.continue_final_message:
            return None
        offered = options.tools if options.tool_choice.mode != "none" else ()
        tools = argument_types({tool.name: tool.parameters or {} for tool in offered})
        single_call = bool(tools) and (not options.parallel_tool_calls or options.tool_choice.mode == "named")
        forced = options.tool_choice.mode in ("required", "named")
        strict = any(tool.strict for tool in offered)
        constrained = bool(options.text_grammar) or forced or strict
        if self._declared and not constrained and (self._shows_tools or not tools):
            return self._of_declared(prompt, options, tools, single_call=single_call)
        if HARMONY in (self.tool_format, self._reasoning_format):
            return self._of_harmony(options, tools, single_call=single_call)
        start, end = self._reasoning_of(prompt) if options.split_reasoning else ("", "")
        tool_format = self.tool_format
        if constrained and tool_format == GENERIC:
            tool_format = "hermes"  # the one of the generic forms that a grammar asks for, and that has a mark
        if not tool_format:
            tools = {}
        if not end and not tools:
            return None
        marks = {start, end}
        end_tokens: tuple[str, ...] = ()
        if tools:
            calls = new_tool_format(tool_format, tools)
            marks.update(calls.begins, calls.tokens)
            end_tokens = calls.end_tokens
        return AnswerFormat(
            end,
            start,
            tool_format if tools else "",
            tools,
            single_call,
            shown_tokens=self._shown(marks),
            end_tokens=end_tokens,
        )

    def _reasoning_of(self, prompt: str) -> tuple[str, str]:
        start, end = self._reasoning
        last = prompt.rstrip()
        if not end or last.endswith(end):
            return "", ""
        return ("" if last.endswith(start) else start), end

    def _of_harmony(
        self, options: ChatOptions, tools: Mapping[str, Mapping[str, bool]], *, single_call: bool
    ) -> AnswerFormat:
        calls = tools if self.tool_format == HARMONY else {}
        splits = options.split_reasoning and self._reasoning_format == HARMONY
        return AnswerFormat(
            "",
            "",
            HARMONY,
            calls,
            single_call,
            split_reasoning=splits,
            shown_tokens=self._shown(harmony.TOKENS),
            end_tokens=harmony.END_TOKENS,
        )

    def _of_declared(
        self, prompt: str, options: ChatOptions, tools: Mapping[str, Mapping[str, bool]], *, single_call: bool
    ) -> AnswerFormat:
        return AnswerFormat(
            tools=tools,
            single_call=single_call,
            split_reasoning=options.split_reasoning,
            declared=self._declared,
            prefix=prefix_of(self._declared, prompt),
            shown_tokens=declared_tokens(self._declared, self._skipped),
        )

    def _shown(self, marks: Collection[str]) -> tuple[str, ...]:
        return tuple(sorted(self._skipped.intersection(marks)))


def new_parser(answer: AnswerFormat) -> AnswerParser:
    """A parser for one answer, before its first character."""
    parser = _parser(answer)
    return parser if answer.show_reasoning else _WithoutReasoning(parser)


class _WithoutReasoning:
    """A parser that leaves the reasoning out. See `AnswerParser`."""

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser

    @property
    def in_reasoning(self) -> bool:
        return self._parser.in_reasoning

    @property
    def ended(self) -> bool:
        return self._parser.ended

    def push(self, text: str) -> list[Part]:
        return _said(self._parser.push(text))

    def flush(self) -> list[Part]:
        return _said(self._parser.flush())


def _said(parts: list[Part]) -> list[Part]:
    return [part for part in parts if not isinstance(part, ReasoningPart)]


def _parser(answer: AnswerFormat) -> AnswerParser:
    if answer.declared:
        return DeclaredParser(
            answer.declared,
            answer.prefix,
            answer.tools,
            reasoning=answer.split_reasoning,
            single_call=answer.single_call,
        )
    if answer.tool_format == HARMONY:
        return harmony.HarmonyParser(
            reasoning=answer.split_reasoning,
            tools=bool(answer.tools),
            single_call=answer.single_call,
            calls_first=answer.calls_first,
        )
    return MarkedParser(
        reasoning=(answer.reasoning_start, answer.reasoning_end) if answer.reasoning_end else None,
        begun=bool(answer.reasoning_end) and not answer.reasoning_start,
        tools=new_tool_format(answer.tool_format, answer.tools) if answer.tools else None,
        single_call=answer.single_call,
        calls_first=answer.calls_first,
    )
