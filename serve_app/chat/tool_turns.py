"""Puts the results of tool calls where templates expect them.

Most templates write results without their ids: the model tells them apart by their order. Promises that results follow
their message in the order of its calls, each with the id and the name of its call. Knows no template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from serve_app.chat.conversation import ChatMessage
from serve_app.chat.tool_calls import ToolCall


def arranged(messages: Sequence[ChatMessage], *, one_call: bool) -> list[ChatMessage]:
    """The messages with each run of results in order. `one_call`: a message with several calls becomes several, each
    with its own results after it."""
    turns: list[ChatMessage] = []
    index = 0
    while index < len(messages):
        message = messages[index]
        index += 1
        if not message.tool_calls:
            turns.append(message)
            continue
        end = index
        while end < len(messages) and messages[end].role == "tool":
            end += 1
        answers = _by_call(message.tool_calls, messages[index:end])
        index = end
        if one_call:
            turns += _one_by_one(message, answers)
        else:
            turns += [message, *(result for results in answers for result in results)]
    return turns


def _by_call(calls: Sequence[ToolCall], results: Sequence[ChatMessage]) -> list[list[ChatMessage]]:
    """The results of each call, and last those that answer none of them.

    A result without an id answers the first call that no other result names. Results that share their id answer the
    calls that share it, in order.
    """
    numbers: dict[str | None, list[int]] = {}
    for number, call in enumerate(calls):
        numbers.setdefault(call.id, []).append(number)
    ids = Counter(result.tool_call_id for result in results)
    named = {number for call_id in ids for number in numbers.get(call_id, ())[: ids[call_id]]}
    left = iter([number for number in range(len(calls)) if number not in named])
    answers: list[list[ChatMessage]] = [[] for _ in range(len(calls) + 1)]
    for result in results:
        number = len(calls)
        if result.tool_call_id is None:
            number = next(left, number)
        elif result.tool_call_id in numbers:
            same = numbers[result.tool_call_id]
            number = same.pop(0) if len(same) > 1 else same[0]
        if number < len(calls):
            call = calls[number]
            result = replace(result, tool_call_id=call.id, name=result.name or call.name)
        answers[number].append(result)
    return answers


def _one_by_one(message: ChatMessage, answers: Sequence[Sequence[ChatMessage]]) -> list[ChatMessage]:
    turns: list[ChatMessage] = []
    for number, call in enumerate(message.tool_calls):
        said = message if number == 0 else ChatMessage("assistant", "", message.name)
        turns += [replace(said, tool_calls=(call,)), *answers[number]]
    return [*turns, *answers[-1]]
