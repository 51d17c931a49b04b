"""Whether a replica can serve a request at all: a function of the request and of what the replica holds."""

from __future__ import annotations

import math
from itertools import chain

from serve_app.core import Failure, FailureCode, GenerationRequest


def refusal(request: GenerationRequest, *, context_tokens: int, vocab_size: int) -> Failure | None:
    """Why the request can't be served, or None when it can.

    Args:
        context_tokens: longest prompt plus output.
        vocab_size: token ids are below it.
    """
    tokens = len(request.prompt_token_ids)
    if not tokens:
        return _invalid("the prompt is empty")
    if tokens + request.max_new_tokens > context_tokens:
        return Failure(
            FailureCode.CONTEXT_LENGTH_EXCEEDED,
            f"the prompt's {tokens} tokens and {request.max_new_tokens} new ones are more than the {context_tokens} "
            "tokens that this replica can hold for one request",
        )
    if request.max_new_tokens < 0 or (request.prompt_logprobs or 0) < 0:
        return _invalid("max_new_tokens and prompt_logprobs must not be negative")
    if not (request.weight > 0 and math.isfinite(request.weight)):
        return _invalid(f"the tenant's weight must be a positive number, not {request.weight}")
    if max(request.sampling.logprobs or 0, request.prompt_logprobs or 0) > vocab_size:
        return _invalid(f"more logprobs than the vocabulary's {vocab_size} tokens")
    biased = tuple(token for token, _ in request.sampling.logit_bias)
    given = (request.prompt_token_ids, request.output_token_ids, request.predicted_token_ids)
    for token in (*chain.from_iterable(given), *biased, *request.stop_token_ids):
        if not 0 <= token < vocab_size:
            return _invalid(f"token id {token} is outside the vocabulary of {vocab_size}")
    return None


def _invalid(message: str) -> Failure:
    return Failure(FailureCode.INVALID_REQUEST, message)
