"""What a wire format is: how a body becomes a request, and how a completion becomes events or one document.

Implemented by `native`, `jina`, `openai`, `anthropic` and `responses`. To add one is to add such a class and its
path in `app`. Knows no replica.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from serve_app.api.http.endpoint import Call
from serve_app.core import RequestError
from serve_app.generation.completion import Usage
from serve_app.generation.events import EventWriter
from serve_app.generation.request import ResolvedRequest
from serve_app.generation.text import Delta

Whole = Callable[[Sequence[Sequence[Delta]], Usage], dict[str, Any] | str]
"""Makes one document, or its JSON, from the deltas of each choice and the usage. May run in a thread."""


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request as its wire format has read it."""

    resolved: ResolvedRequest
    whole: Whole | None
    """How the answer is written as one document; None when the caller wants events."""
    settings: dict[str, Any] = field(default_factory=dict)
    """JSON: what the format's writer needs besides the request. It is kept with a stream that can be resumed."""
    max_tokens_param: str = "max_tokens"
    """The name of the field in which the caller gave its token limit."""
    constraint_param: str = "tools"
    """The name of the field that says what the answer must match."""


def usage_document(usage: Usage) -> dict[str, object]:
    """OpenAI's usage object, which the native format uses too, as JSON."""
    of_completion = {"reasoning_tokens": usage.reasoning_tokens}
    if usage.accepted_prediction_tokens is not None and usage.rejected_prediction_tokens is not None:
        of_completion["accepted_prediction_tokens"] = usage.accepted_prediction_tokens
        of_completion["rejected_prediction_tokens"] = usage.rejected_prediction_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": of_completion,
    }


class WireFormat(ABC):
    """The wire format of one endpoint."""

    name: ClassVar[str]
    """Stored with resumable streams, so it must not change."""

    @abstractmethod
    async def parse(self, call: Call) -> ParsedRequest:
        """The request in a call's body or query. Raises `RequestError`."""

    @abstractmethod
    def writer(self, request: ResolvedRequest, settings: Mapping[str, Any]) -> EventWriter:
        """A writer for the events of one stream, from the first on."""

    def reader_error(
        self, error: RequestError, request: ResolvedRequest, settings: Mapping[str, Any], position: int
    ) -> bytes:
        """The event of an error that ends a resumable stream for one reader alone.

        `position`: how many events the reader has got or had before.
        """
        return self.writer(request, settings).failed(error)
