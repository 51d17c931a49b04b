"""Splits a model's reasoning, such as `<think>...</think>`, from the answer that follows it.

Promises the same parts however the text was cut, and that whitespace around the marks belongs to neither part. Knows
no template and no tokens.
"""

from __future__ import annotations

from serve_app.chat.parts import Part, ReasoningPart, TextPart


class ReasoningParser:
    """Reads an answer that may begin with reasoning. See `AnswerParser`."""

    def __init__(self, start: str, end: str) -> None:
        """`start`: what begins the reasoning; empty when the prompt has begun it. `end`: what ends it."""
        self._start = start
        self._end = end
        self._held = ""
        """Text that may still turn out to be a mark, or whitespace beside one."""
        self._begun = not start
        """The reasoning has begun, or there is none."""
        self._trims = True
        """Whitespace that comes now stands beside a mark."""
        self.in_reasoning = not start

    def push(self, text: str) -> list[Part]:
        """See `AnswerParser`."""
        self._held += text
        parts: list[Part] = []
        if not self._begun:
            self._begin()
        if self._begun and self.in_reasoning:
            self._reason(parts)
        if self._begun and not self.in_reasoning:
            self._say(parts)
        return parts

    def flush(self) -> list[Part]:
        """See `AnswerParser`."""
        held, self._held = self._held, ""
        if self.in_reasoning:
            held = held.lstrip() if self._trims else held
            return [ReasoningPart(kept)] if (kept := held.rstrip()) else []
        return [TextPart(held)] if held else []

    def _begin(self) -> None:
        """Decide whether the answer begins with reasoning, once that is certain."""
        seen = self._held.lstrip()
        if seen.startswith(self._start):
            self._held = seen.removeprefix(self._start)
            self._begun = self.in_reasoning = True
        elif not self._start.startswith(seen):
            self._begun = True
            self._trims = False

    def _reason(self, parts: list[Part]) -> None:
        inside, mark, after = self._held.partition(self._end)
        if mark:
            certain, self._held = inside.rstrip(), after
        else:
            kept = len(self._held) - _overlap(self._held, self._end)
            certain = self._held[:kept].rstrip()
            self._held = self._held[len(certain) :]
        if self._trims:
            certain = certain.lstrip()
        if certain:
            parts.append(ReasoningPart(certain))
            self._trims = False
        if mark:
            self.in_reasoning = False
            self._trims = True

    def _say(self, parts: list[Part]) -> None:
        text, self._held = self._held, ""
        if self._trims:
            text = text.lstrip()
        if text:
            parts.append(TextPart(text))
            self._trims = False


def _overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` that `mark` begins with, less than the whole mark."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
