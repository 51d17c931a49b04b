"""How the text of an answer is read: the format, which travels with its request, and the parser for it.

Promises that an equal format reads an equal text in the same way in every process. Knows no wire format.
"""

from __future__ import annotations

from msgspec import Struct

from serve_app.chat.parts import AnswerParser
from serve_app.chat.reasoning import ReasoningParser

_REASONING = (("<think>", "</think>"),)
"""(start, end) of reasoning, as templates and models write it."""


class AnswerFormat(Struct, frozen=True):
    """How one answer's text is read. A request without it has an answer that is text and nothing else."""

    reasoning_end: str
    """What ends the model's reasoning, e.g. `</think>`."""
    reasoning_start: str = ""
    """What begins it. Empty: the prompt has begun it."""


def answer_format(template: str, prompt: str) -> AnswerFormat | None:
    """The format of the answer to a chat; None when it is text and nothing else.

    `template`: the model's chat template, which shows what marks the model uses. `prompt`: the end of the prompt, with
    the names of control tokens in it: it may have begun the reasoning, or ended it so that there is none.
    """
    for start, end in _REASONING:
        if end in template:
            last = prompt.rstrip()
            return None if last.endswith(end) else AnswerFormat(end, "" if last.endswith(start) else start)
    return None


def new_parser(answer: AnswerFormat) -> AnswerParser:
    """A parser for one answer, before its first character."""
    return ReasoningParser(answer.reasoning_start, answer.reasoning_end)
