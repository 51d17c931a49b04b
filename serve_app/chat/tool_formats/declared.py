"""Reads an answer by the response template that a checkpoint declares for transformers.

transformers' own parser keeps all text so far, and searches it again at each piece; it raises for what it can't read;
and where a pattern could match in two places its result may depend on the pieces. So this module reads the same
templates itself: what it gives is what a parser gives that sees one character at a time, and the cost is linear.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from serve_app.chat.answer_parser import Answer
from serve_app.chat.parts import Part
from serve_app.chat.reading import Reader, Steps
from serve_app.chat.tool_formats.json_calls import CallReader
from serve_app.chat.tool_formats.json_text import encodable, value_of, written
from serve_app.chat.tool_formats.xml_calls import ArgumentTypes
from serve_app.transformers_internals import compiled_response_template, response_field_value

_REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})
_CALLS = "tool_calls"
_LONGEST_MARK = 256
"""Characters that may wait to become a mark. Whitespace before a mark may be part of it."""
_LOOK_BEHIND = 256
"""Characters before the unread ones that a pattern may look at."""


@lru_cache(maxsize=8)
def _compiled(declared: str) -> Any:
    return compiled_response_template(json.loads(declared))


def declared_tokens(declared: str, special: Collection[str]) -> tuple[str, ...]:
    """The special tokens that the response template names, as they are or in a regular expression."""
    strings = "\n".join(_strings(json.loads(declared)))
    return tuple(sorted(token for token in special if token in strings or re.escape(token) in strings))


def prefix_of(declared: str, prompt: str) -> str:
    """What the prompt has of the answer already: what follows the last mark of an answer's beginning, if it has one."""
    compiled = _compiled(declared)
    if not compiled.start_anchor_re.search(prompt):
        return ""
    return str(compiled.truncate_past_last_anchor(prompt))


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for each in values for text in _strings(each)]


class DeclaredParser:
    """See `AnswerParser`."""

    def __init__(
        self,
        declared: str,
        prefix: str,
        tools: ArgumentTypes,
        *,
        reasoning: bool = True,
        single_call: bool = False,
    ) -> None:
        """`prefix`: what the prompt has of the answer. `tools`: of the request; without any, calls are text.

        `reasoning`: tell it apart from the text.
        """
        self._fields: Mapping[str, Any] = _compiled(declared).fields
        self._implicit: str | None = _compiled(declared).implicit
        self._splits_reasoning = reasoning
        self._tools = tools
        self._reader = Reader()
        self._answer = Answer(self._reader, single_call=single_call, trims=True)
        self._field: Any = None
        """The field whose region is open; None: the implicit one, or none."""
        self._call: _Call | _JsonCall | None = None
        self._text = ""
        """The unread text, after a few characters of what was read."""
        self._at = 0
        self._emptied = -1
        """Where the last mark without a character was read: it must not be read again."""
        self.push(prefix)

    @property
    def in_reasoning(self) -> bool:
        """See `AnswerParser`."""
        return self._answer.in_reasoning

    @property
    def ended(self) -> bool:
        """See `AnswerParser`."""
        return self._answer.ended

    def push(self, text: str) -> list[Part]:
        """See `AnswerParser`."""
        behind = max(0, self._at - _LOOK_BEHIND)
        start = len(self._text) - behind
        self._text = self._text[behind:] + text
        self._at -= behind
        if self._scan(len(self._text), ended=False) is None:
            self._read_to(len(self._text))
        else:
            for end in range(start + 1, len(self._text) + 1):
                self._read(end, ended=False)
        return self._answer.take()

    def flush(self) -> list[Part]:
        """See `AnswerParser`."""
        self._read(len(self._text), ended=True)
        self._close("")
        self._answer.close()
        return self._answer.take()

    def _read(self, end: int, *, ended: bool) -> None:
        """Read the text up to `end`, but for what may be the beginning of a mark."""
        while not self._answer.ended:
            found = self._scan(end, ended=ended)
            if found is None:
                self._read_to(end)
                return
            start, field, match = found
            if field is None and end - start <= _LONGEST_MARK:
                self._read_to(start)
                return
            empty_again = match.end() == self._emptied
            if field is None or empty_again:
                self._read_to(start + 1)
                if self._at >= end:
                    return
                continue
            self._read_to(start)
            self._at = match.end()
            self._emptied = match.end() if match.end() == start else -1
            if self._field is None and field.name != self._implicit:
                self._open(field, match)
            else:
                self._close(match.group())

    def _scan(self, end: int, *, ended: bool) -> tuple[int, Any, Any] | None:
        """The first mark in the text up to `end`: (start, field, match); without a field it may only become one."""
        best: tuple[Any, ...] | None = None
        for order, (field, pattern, literals, can_extend) in enumerate(self._watched()):
            found = pattern.search(self._text, self._at, end, partial=not ended)
            if found is None or (found.start() == end and not ended and found.partial):
                continue
            size = found.end() - found.start()
            open_end = found.end() == end and (size == 0 or literals is None or can_extend)
            pending = not ended and (found.partial or open_end)
            if pending and size == 0:
                continue
            key = (found.start(), not pending, -size, order)
            if best is None or key < best[0]:
                best = (key, None if pending else field, found)
        return None if best is None else (best[0][0], best[1], best[2])

    def _watched(self) -> list[tuple[Any, Any, Any, bool]]:
        if self._field is not None:
            field = self._field
            if field.close_re is None:
                return []
            return [(field, field.close_re, field.close_literals, field.close_literal_can_extend)]
        watched = [
            (field, field.open_re, field.open_literals, field.open_literal_can_extend)
            for field in self._fields.values()
            if field.open_re is not None
        ]
        implicit = self._fields.get(self._implicit or "")
        if implicit is not None and implicit.close_re is not None:
            watched.append((implicit, implicit.close_re, implicit.close_literals, implicit.close_literal_can_extend))
        return watched

    def _read_to(self, end: int) -> None:
        text = self._text[self._at : end]
        self._at = max(self._at, end)
        if not text:
            return
        if self._call is not None:
            self._call.push(text)
        elif self._answer.in_reasoning:
            self._answer.reasoning(text)
        else:
            self._answer.text(text)

    def _open(self, field: Any, match: Any) -> None:
        self._field = field
        if self._is_text(field):
            self._answer.text(match.group())
        elif field.name == _CALLS and _is_json_call(field):
            self._call = _JsonCall(match, self._answer, self._reader)
        elif field.name == _CALLS:
            self._call = _Call(field, match, self._answer, self._tools)
        else:
            self._answer.mark()
            self._answer.in_reasoning = field.name in _REASONING

    def _close(self, mark: str) -> None:
        """Close the open region at `mark`; "" at the answer's end."""
        if self._call is not None:
            self._call.close(mark)
            self._call = None
        elif self._field is not None and self._is_text(self._field):
            self._answer.text(mark)
        elif mark:
            self._answer.mark()
        if mark:
            self._answer.in_reasoning = False
        self._field = None

    def _is_text(self, field: Any) -> bool:
        """Whether a region is text, with its marks: the request has no use for what it is."""
        return bool(
            (field.name == _CALLS and not self._tools) or (field.name in _REASONING and not self._splits_reasoning)
        )


class _Call:
    """A region of calls that is read at its end, by transformers' parsers of contents."""

    def __init__(self, field: Any, match: Any, answer: Answer, tools: ArgumentTypes) -> None:
        self._field = field
        self._captures = {name: text for name, text in match.groupdict().items() if text is not None}
        self._answer = answer
        self._tools = tools
        self._opened = match.group()
        self._pieces: list[str] = []

    def push(self, text: str) -> None:
        """More of the region."""
        self._pieces.append(text)

    def close(self, mark: str) -> None:
        """The region ended at `mark`, or with the answer. What can't be read is text."""
        body = "".join(self._pieces)
        calls = _calls(response_field_value(body, self._field, self._captures), self._tools)
        if not calls:
            self._answer.text(f"{self._opened}{body}{mark}")
        for name, arguments in calls:
            if not self._answer.ended:
                self._answer.call(name)
                self._answer.arguments(arguments)
                self._answer.end_call()


class _JsonCall:
    """A region whose text is the JSON of a call, which is read as it comes."""

    def __init__(self, match: Any, answer: Answer, reader: Reader) -> None:
        """`reader`: the answer's own, which nobody else reads."""
        self._answer = answer
        self._reader = reader
        reader.ended = False
        reader.hold(match.group())
        self._steps: Steps[None] | None = self._read()

    def push(self, text: str) -> None:
        """More of the region."""
        self._reader.feed(text)
        if self._steps is not None and next(self._steps, self) is self:
            self._steps = None

    def close(self, mark: str) -> None:
        """The region ended at `mark`, or with the answer."""
        self._reader.ended = True
        self.push("")
        rest = self._reader.rest()
        if left := self._reader.release() or rest:  # what is held has the rest in it
            self._answer.text(left + mark)

    def _read(self) -> Steps[None]:
        yield from self._reader.space()
        yield from CallReader(self._reader, self._answer).read()
        yield from self._reader.space()


def _is_json_call(field: Any) -> bool:
    """Whether a region is the JSON of one call, with its name and arguments as the model writes them."""
    transform = field.transform
    whole = isinstance(transform, Mapping) and transform.get("function") == "{content}"
    return bool(whole and not field.transform_each and field.content == "json" and not field.content_args)


def _calls(value: object, tools: ArgumentTypes) -> list[tuple[str, str]]:
    """(name, arguments) of the calls in the value of a region; none if it is anything else."""
    if isinstance(value, list):
        return [call for each in value for call in _calls(each, tools)]
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str) or not name:
        return []
    if encodable(name) != name:
        return []
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        is_text = tools.get(name, {})
        typed = {key: each if is_text.get(key, True) else _typed(each) for key, each in arguments.items()}
        try:
            return [(name, written(typed))]
        except ValueError:
            return []
    return [(name, encodable(arguments) if isinstance(arguments, str) else "{}")]


def _typed(value: object) -> object:
    """The value of an argument that is no text: formats with tags write JSON there."""
    try:
        return value_of(value) if isinstance(value, str) else value
    except ValueError:
        return value
