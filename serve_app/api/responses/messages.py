"""Items as the messages of a chat, which the model's template writes.

Promises that an error names the item that the client sent, not the message that was made of it. Knows no template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from serve_app.api.responses.items import Item, summary_of, text_of
from serve_app.chat.prompt_error import PromptError
from serve_app.core import FailureCode

_SUMMARY = "This is a summary of the conversation up to here:\n\n"
"""What the model reads before the summary in a compaction item."""
PREVIOUS = "previous_response_id"
"""The place of what the request itself did not give."""
_MESSAGE = re.compile(r"messages\[(\d+)\]")


class Messages:
    """The messages of a conversation, with the place in the request that each was made of."""

    def __init__(self, instructions: str | None, items: Sequence[Item], first: int) -> None:
        """`first`: the number of items that the request itself did not give; see `Conversation.earlier`."""
        self.messages: list[dict[str, Any]] = []
        self._places: list[str] = []
        self._reasoning: list[str] = []
        """Reasoning that belongs to what the assistant says next."""
        self._turn: dict[str, Any] | None = None
        """The assistant's message that calls may still be added to."""
        if instructions:
            self._add("instructions", {"role": "system", "content": instructions})
        for index, item in enumerate(items):
            place = PREVIOUS if index < first else f"input[{index - first}]"
            self._take(item, place)

    def place(self, text: str) -> str:
        """A text about messages, such as `messages[1].content`, in the words of the request."""

        def of_item(match: re.Match[str]) -> str:
            index = int(match[1])
            return self._places[index] if index < len(self._places) else "input"

        named = _MESSAGE.sub(of_item, text)
        return "input" if named == "messages" else named

    def named(self, error: PromptError) -> PromptError:
        """The error, with the places of the request instead of those of the messages."""
        message = self.place(error.message)
        if error.code == FailureCode.CONTEXT_LENGTH_EXCEEDED:
            message = message.replace("messages", "input")
        param = None if error.param is None else self.place(error.param)
        return PromptError(message, param=param, code=error.code or "invalid_prompt")

    def _take(self, item: Item, place: str) -> None:
        match item["type"]:
            case "reasoning":
                self._turn = None
                self._reasoning += [part["text"] for part in item["content"] or item["summary"]]
            case "function_call":
                self._call(item, place)
            case "function_call_output":
                self._add(place, {"role": "tool", "tool_call_id": item["call_id"], "content": text_of(item)})
            case "compaction":
                self._add(place, {"role": "user", "content": _SUMMARY + summary_of(item)})
            case _:
                message = {"role": item["role"], "content": text_of(item)}
                if item["role"] == "assistant":
                    self._say(place, message)
                else:
                    self._add(place, message)

    def _call(self, item: Item, place: str) -> None:
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        if self._turn is None:
            self._say(place, {"role": "assistant", "content": None})
        assert self._turn is not None
        self._turn.setdefault("tool_calls", []).append(call)

    def _say(self, place: str, message: dict[str, Any]) -> None:
        if self._reasoning:
            message["reasoning_content"] = "\n".join(self._reasoning)
        self._add(place, message)
        self._turn = message

    def _add(self, place: str, message: dict[str, Any]) -> None:
        self._turn, self._reasoning = None, []
        self.messages.append(message)
        self._places.append(place)
