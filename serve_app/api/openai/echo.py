"""The prompt before its answer: its text, and where each of its tokens begins in it.

A function of the prompt's ids, so another ingress shows the same. Knows no endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.chat.detokenizer import new_detokenizer
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.generation.request import ResolvedRequest


class Echo:
    """The prompts of one request. Each is decoded when it is first asked for."""

    def __init__(self, tokenizer: ChatTokenizer, request: ResolvedRequest) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._texts: dict[tuple[int, ...], str] = {}

    def ids(self, choice: int) -> tuple[int, ...]:
        """The tokens of the prompt of this choice."""
        return self._request.requests[choice].prompt_token_ids

    def text(self, choice: int) -> str:
        """The prompt of this choice. Special tokens have no text, as in an answer."""
        ids = self.ids(choice)
        if ids not in self._texts:
            self._texts[ids] = self._tokenizer.decode(ids)
        return self._texts[ids]

    def offsets(self, choice: int) -> Sequence[int]:
        """For each token of the prompt, the characters before its text."""
        detokenizer = new_detokenizer(self._tokenizer)
        offsets, chars = [], 0
        for token_id in self.ids(choice):
            offsets.append(chars)
            chars += len(detokenizer.push(token_id))
        return offsets
