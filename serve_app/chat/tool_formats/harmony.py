"""gpt-oss's harmony: an answer is a sequence of messages, each in a channel.

`<|channel|>analysis<|message|>...<|end|>` is reasoning, `<|channel|>final<|message|>...` is the answer, and a message
to a function, `<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>`, is a call. Source:
OpenAI's openai-harmony and its guide.
"""

from __future__ import annotations

import re

from serve_app.chat.answer_parser import StepsParser
from serve_app.chat.reading import Marks, Steps

TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>")
END_TOKENS = ("<|call|>", "<|return|>")

_BEGINS = ("<|start|>", "<|channel|>")
_HEADER_ENDS = Marks("<|message|>", "<|end|>", *END_TOKENS)
NEXT = ("<|end|>", *_BEGINS, *END_TOKENS)
"""What ends the text of a message."""
_NEXT = Marks(*NEXT)
_RECIPIENT = re.compile(r"to=functions\.([\w.\-]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class HarmonyParser(StepsParser):
    """Reads an answer in harmony's format, after a prompt that ends with `<|start|>assistant`. See `AnswerParser`."""

    def __init__(self, *, reasoning: bool, tools: bool, single_call: bool = False, calls_first: bool = False) -> None:
        """`reasoning`: tell it apart from the text. `tools`: calls are calls; else they are text. `calls_first`: the
        final message is the rest of the answer."""
        self._final_ends = Marks() if calls_first else _NEXT
        self._reasoning = reasoning
        self._tools = tools
        super().__init__(single_call=single_call)

    def _read(self) -> Steps[None]:
        reader, answer = self._reader, self._answer
        mark = yield from reader.one_of("<|message|>", *_BEGINS, " to=")
        if not mark:
            mark = yield from reader.until(_NEXT, answer.text)
        while mark and not answer.ended:
            if mark in ("<|end|>", *END_TOKENS):
                answer.mark()
                mark = yield from reader.until(_NEXT, answer.text)
            else:
                mark = yield from self._message(mark)

    def _message(self, mark: str) -> Steps[str]:
        """Read a message after the mark that begins it. Returns the mark after it, "" at the end."""
        reader, answer = self._reader, self._answer
        pieces = [mark]
        if mark != "<|message|>":
            mark = yield from reader.until(_HEADER_ENDS, pieces.append)
        if mark != "<|message|>":  # no header, or one that the end of the answer cut off
            answer.text("".join(pieces) if mark else "")
            return mark
        answer.mark()
        header = "".join(pieces)
        channel = _CHANNEL.search(header)
        recipient = _RECIPIENT.search(header)
        if recipient is not None and self._tools:
            answer.call(recipient[1])
            after = yield from reader.until(_NEXT, answer.arguments)
            if after:
                answer.end_call()
            return after
        if recipient is not None:
            answer.text(f"{header}<|message|>")
        elif channel is not None and channel[1] == "analysis" and self._reasoning:
            answer.in_reasoning = True
            after = yield from reader.until(_NEXT, answer.reasoning)
            answer.in_reasoning = False
            return after
        is_final = channel is not None and channel[1] == "final"
        return (yield from reader.until(self._final_ends if is_final else _NEXT, answer.text))
