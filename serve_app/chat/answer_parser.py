"""Reads an answer as text, reasoning and tool calls.

Promises the same parts however the text was cut, and that nothing is lost but the marks and the whitespace beside
them: what is no call is text. Knows no template and no tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from serve_app.chat.parts import ArgumentsPart, CallPart, Part, ReasoningPart, TextPart
from serve_app.chat.reading import Marks, Reader, Steps


class Answer:
    """What was read so far: takes text, reasoning and calls in the order in which the model wrote them."""

    def __init__(self, reader: Reader, *, single_call: bool, trims: bool) -> None:
        """`single_call`: the answer ends with its first call. `trims`: whitespace may stand before a mark, so it
        waits for what follows it."""
        self._reader = reader
        self._single_call = single_call
        self._trims = trims
        self._parts: list[Part] = []
        self._kind: type[TextPart] | type[ReasoningPart] | None = None
        self._pieces: list[str] = []
        """Text of `_kind`, or arguments where that is None, which is not among the parts yet."""
        self._space: list[str] = []
        """Whitespace that belongs to the text if more of it follows, and not if a mark does."""
        self._beside_mark = False
        self._has_arguments = False
        self.in_reasoning = False
        self.calls = 0
        """Calls that have begun."""
        self.ended = False
        """The one call that the answer may have is complete."""

    def take(self) -> list[Part]:
        """The parts that are new."""
        self._join()
        parts, self._parts = self._parts, []
        return parts

    def text(self, text: str) -> None:
        """More text."""
        self._say(TextPart, text, trims=self._trims)

    def reasoning(self, text: str) -> None:
        """More reasoning."""
        self._say(ReasoningPart, text, trims=True)

    def mark(self) -> None:
        """A mark was read. The whitespace beside it is no text."""
        self._space.clear()
        self._beside_mark = True

    def call(self, name: str) -> None:
        """A call begins for certain: what the reader held is no text."""
        self._reader.release()
        self.mark()
        self._turn(None)
        self._parts.append(CallPart(self.calls, name))
        self.calls += 1
        self._has_arguments = False

    def arguments(self, text: str) -> None:
        """More of the arguments of the call that began last."""
        self._pieces.append(text)
        self._has_arguments = True

    def end_call(self) -> None:
        """The call that began last is complete. Without arguments it has an empty object."""
        if not self._has_arguments:
            self.arguments("{}")
        self.ended = self._single_call

    def close(self) -> None:
        """The answer ended."""
        if self._space and not self.in_reasoning:
            self._turn(TextPart)
            self._pieces += self._space
        self._space.clear()

    def _say(self, kind: type[TextPart] | type[ReasoningPart], text: str, *, trims: bool) -> None:
        if self._beside_mark:
            text = text.lstrip()
            self._beside_mark = not text
        said = text.rstrip() if trims else text
        if said:
            self._turn(kind)
            self._pieces += self._space
            self._space.clear()
            self._pieces.append(said)
        if len(said) < len(text):
            self._space.append(text[len(said) :])

    def _turn(self, kind: type[TextPart] | type[ReasoningPart] | None) -> None:
        """What comes now is of this kind."""
        if kind is not self._kind or kind is None:
            self._join()
            self._kind = kind

    def _join(self) -> None:
        if text := "".join(self._pieces):
            part = ArgumentsPart(self.calls - 1, text) if self._kind is None else self._kind(text)
            self._parts.append(part)
        self._pieces.clear()


class StepsParser(ABC):
    """An `AnswerParser` written as one generator."""

    def __init__(self, *, single_call: bool = False, trims: bool = True) -> None:
        self._reader = Reader()
        self._answer = Answer(self._reader, single_call=single_call, trims=trims)
        self._steps: Steps[None] | None = self._read()

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
        self._reader.feed(text)
        self._step()
        return self._answer.take()

    def flush(self) -> list[Part]:
        """See `AnswerParser`."""
        self._reader.ended = True
        self._step()
        self._answer.close()
        return self._answer.take()

    def _step(self) -> None:
        if self._steps is not None and next(self._steps, self) is self:
            self._steps = None

    @abstractmethod
    def _read(self) -> Steps[None]:
        """Read the whole answer."""


class ToolFormat(ABC):
    """How a family of models writes tool calls."""

    name = ""
    begins: tuple[str, ...] = ()
    """Marks in the text that begin calls."""
    bare = ""
    """First characters of calls that have no mark before them, where the answer, or what follows a call, begins."""
    tokens: tuple[str, ...] = ()
    """Marks that may be special tokens, besides `begins`."""
    end_tokens: tuple[str, ...] = ()
    """Tokens that end an answer after a call."""

    @abstractmethod
    def read(self, reader: Reader, answer: Answer, mark: str) -> Steps[None]:
        """Read the calls after `mark`, which is empty for bare ones.

        Begins no call in `answer` unless it is certain that it is one. What it reads while the reader holds becomes
        text. What it reads otherwise must be told or be a mark.
        """


class MarkedParser(StepsParser):
    """Reads an answer that is text, but for reasoning and calls between marks."""

    def __init__(
        self,
        *,
        reasoning: tuple[str, str] | None = None,
        begun: bool = False,
        tools: ToolFormat | None = None,
        single_call: bool = False,
        calls_first: bool = False,
    ) -> None:
        """`reasoning`: what begins and what ends it; it may stand where the answer begins, and after a call.

        `begun`: the prompt has begun the reasoning. `calls_first`: what follows text is text.
        """
        self._start, end = reasoning or ("", "")
        self._end = Marks(end)
        self._tools = tools
        self._begins = () if tools is None else tools.begins
        self._begins_in_text = Marks(*(() if calls_first else self._begins))
        self._calls_first = calls_first
        super().__init__(single_call=single_call, trims=tools is not None)
        self._answer.in_reasoning = begun

    def _read(self) -> Steps[None]:
        reader, answer = self._reader, self._answer
        if answer.in_reasoning:
            answer.mark()
            yield from self._reason()
        while not answer.ended and (yield from reader.peek()):
            space = yield from reader.space()
            if self._start and (yield from reader.has(self._start)):
                answer.mark()
                answer.in_reasoning = True
                yield from self._reason()
                continue
            answer.text(space)
            if not (yield from self._first_call()):
                yield from self._say()

    def _first_call(self) -> Steps[bool]:
        """Read calls that begin here, unless it is `_say` that finds them."""
        first = yield from self._reader.peek()
        if self._tools is None or not first:
            return False
        if first in self._tools.bare:
            return (yield from self._call(self._tools, ""))
        mark = (yield from self._reader.one_of(*self._begins)) if self._calls_first else ""
        return bool(mark) and (yield from self._call(self._tools, mark))

    def _reason(self) -> Steps[None]:
        if (yield from self._reader.until(self._end, self._answer.reasoning)):
            self._answer.in_reasoning = False
            self._answer.mark()

    def _say(self) -> Steps[None]:
        """Read text up to the end of the call that follows it."""
        while mark := (yield from self._reader.until(self._begins_in_text, self._answer.text)):
            if self._tools is not None and (yield from self._call(self._tools, mark)):
                return

    def _call(self, tools: ToolFormat, mark: str) -> Steps[bool]:
        """Read what may be calls; False, and it is text, if it has none."""
        before = self._answer.calls
        self._reader.hold(mark)
        yield from tools.read(self._reader, self._answer, mark)
        if held := self._reader.release():
            self._answer.text(held)
        return self._answer.calls > before
