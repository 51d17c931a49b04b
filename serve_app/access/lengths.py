"""How long the answers of a request may be, by the limits of its caller.

Promises that what comes out of here fits into the caller's limits at a time when nothing else is used. Knows no wire
format.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import structs

from serve_app.access.caller import Caller, Limits
from serve_app.core import FailureCode, GenerationRequest, RequestError
from serve_app.generation.request import ResolvedRequest

NEVER_FITS = "exceeds_rate_limit"
"""The code of a request that no wait would help."""
DEFAULT_SHARE = 4
"""The answers of a request that gives no limit of its own get at most this part, a quarter, of the tokens that its
caller has in a minute or a day. A request reserves its longest answer until it ends: with a longer default, one chat of
a model with a long context would keep out all others of its caller."""


def fitted(request: ResolvedRequest, caller: Caller, param: str = "max_tokens") -> ResolvedRequest:
    """The request with its answers cut to what its caller may ask for; the same object where nothing is cut.

    `param`: the field with the caller's own limit. Raises `RequestError` (400) for a request that can never fit.
    """
    limits = (caller.limits, caller.tenant_limits)
    context = _least(limits, "context_tokens")
    answer = _least(limits, "answer_tokens")
    total = _least(limits, "tokens_per_minute", "tokens_per_day")
    if context is None and answer is None and total is None:
        return request
    lengths = [_length(each, context, answer) for each in request.requests]
    if total is not None:
        lengths = _within(request, lengths, total, param)
    if lengths == [each.max_new_tokens for each in request.requests]:
        return request
    if request.requests[0].sampling.min_tokens > min(lengths):
        message = f"min_tokens is larger than the {min(lengths)} that your limits let an answer have."
        raise RequestError(message, code="invalid_value", param="min_tokens")
    pairs = zip(request.requests, lengths, strict=True)
    return structs.replace(
        request, requests=tuple(structs.replace(each, max_new_tokens=length) for each, length in pairs)
    )


def reserved_tokens(request: ResolvedRequest) -> int:
    """The most that the request can use: its prompts, and the longest answer of each choice."""
    return request.prompt_tokens + sum(each.max_new_tokens for each in request.requests)


def _length(request: GenerationRequest, context: int | None, answer: int | None) -> int:
    """The longest answer of one choice. Raises `RequestError` for a prompt that leaves no room for one."""
    longest = request.max_new_tokens if answer is None else min(request.max_new_tokens, answer)
    if context is None:
        return longest
    room = context - len(request.prompt_token_ids)
    if room < min(1, request.max_new_tokens):
        message = (
            f"Your maximum context length is {context} tokens. However, your prompt has "
            f"{len(request.prompt_token_ids)} tokens, which leaves no room for an answer. Please shorten the prompt."
        )
        raise RequestError(message, code=FailureCode.CONTEXT_LENGTH_EXCEEDED)
    return min(longest, room)


def _within(request: ResolvedRequest, lengths: list[int], total: int, param: str) -> list[int]:
    """The lengths, cut so that they and the prompts fit into `total`. Raises `RequestError` where they can't."""
    room = total - request.prompt_tokens
    if request.asked_tokens is None:
        share = min(room, total // DEFAULT_SHARE) // request.choices
        lengths = [min(length, max(1, share)) for length in lengths]
    if sum(lengths) <= room:
        return lengths
    own = request.asked_tokens is not None
    message = (
        f"This request can never fit into your limit of {total} tokens: its prompt has {request.prompt_tokens}, and "
        f"its answers can have {sum(lengths)}. " + (f"Lower {param}, or shorten" if own else "Shorten") + " the prompt."
    )
    raise RequestError(message, code=NEVER_FITS, param=param if own else None)


def _least(limits: tuple[Limits, ...], *names: str) -> int | None:
    def given() -> Iterator[int]:
        for each in limits:
            for name in names:
                if (value := getattr(each, name)) is not None:
                    yield value

    return min(given(), default=None)
