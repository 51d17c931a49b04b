"""The documents that cross the wire, as the client sees them: what a caller sends, and what it gets.

Fields that a newer server adds are ignored. A documented field that is missing or mistyped raises ServerError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Required, TypedDict

from serve_app.client.errors import ServerError


class Message(TypedDict, total=False):
    """One turn of a chat."""

    role: Required[str]
    """`system`, `user` or `assistant`."""
    content: Required[str]


class Options(TypedDict, total=False):
    """How to generate. What is left out or None takes the server's default."""

    max_tokens: int | None
    temperature: float | None
    """0 is greedy."""
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    """Same request, same seed, same tokens. Drawn by the server when left out, and given back in `Done.seed`."""
    stop: str | list[str] | None
    """The answer ends before the first of these strings."""
    cache_salt: str | None
    """The prompt shares computed prefixes only with prompts of the same salt. 1 to 256 characters."""
    priority: str | None
    """`interactive` (the default), or `batch`: it starts when no interactive request waits, and yields to others."""
    parse_special: bool | None
    """Only for `prompt`: read control tokens in its text as such. Never with text from users."""


@dataclass(frozen=True, slots=True)
class ModelOutputDocument:
    """One output token."""

    token_id: int
    generated_text: str
    """What this token adds to the text; empty while a character is incomplete. The pieces concatenated are the text."""

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> ModelOutputDocument:
        """Raises ServerError when `body` is no such document."""
        return cls(_field(body, "token_id", int), _field(body, "generated_text", str))


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of a stream."""

    finish_reason: str
    """`stop`: the model or a stop string ended it; `length`: max_tokens or the context did."""
    usage: Usage
    seed: int

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Done:
        """Raises ServerError when `body` is no such document."""
        usage = _field(body, "usage", dict)
        return cls(
            _field(body, "finish_reason", str),
            Usage(_field(usage, "prompt_tokens", int), _field(usage, "completion_tokens", int)),
            _field(body, "seed", int),
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    done: Done


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of /v1/models."""

    id: str
    details: Mapping[str, Any]
    """The whole entry, with what the server adds to OpenAI's fields."""

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Model:
        """Raises ServerError when `body` is no such document."""
        return cls(_field(body, "id", str), dict(body))


@dataclass(frozen=True, slots=True)
class Readiness:
    """What /ready says."""

    ready: bool
    stage: str = ""
    """For people, while not ready: "fetching weights", "loading weights"."""
    fraction: float | None = None
    """0 to 1 within the stage; None when unknown."""
    error: str | None = None
    """One sentence, when loading failed for good."""
    details: Mapping[str, Any] | None = None
    """The whole answer."""


def _field(body: Mapping[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ServerError(f"the server's answer has no valid `{name}`; is this a serve_app of another version?")
    return value
