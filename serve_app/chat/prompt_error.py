"""The error for messages or a prompt that can't be turned into ids.

Promises that a client may see every error's text. Knows no HTTP.
"""

from __future__ import annotations

from serve_app.core import FailureCode, RequestError


class PromptError(RequestError):
    """The caller's messages or prompt can't be served as they are."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_prompt") -> None:
        """`message` is one sentence for the caller; `param` the offending field, e.g. `messages[2].content`."""
        super().__init__(message, code=code, param=param)


def context_exceeded(context_tokens: int, prompt_tokens: int, param: str, *, counted: str = "") -> PromptError:
    """The error for a prompt that leaves no room for an answer, in OpenAI's words, by which gateways recognise it.

    `counted`: "at least " for a count that is a lower bound.
    """
    message = (
        f"This model's maximum context length is {context_tokens} tokens. However, your {param} resulted in {counted}"
        f"{prompt_tokens} tokens, which leaves no room for an answer. Please reduce the length of the {param}."
    )
    return PromptError(message, param=param, code=FailureCode.CONTEXT_LENGTH_EXCEEDED)
