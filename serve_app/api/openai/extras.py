"""What an answer shows besides OpenAI's own fields, where its caller asks for it: vLLM's extensions, in vLLM's shapes.

Knows no endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from serve_app.chat.token_texts import TokenTexts
from serve_app.core import PromptLogprobs

LOWEST_LOGPROB = -9999.0
"""What OpenAI gives for a token that can't come; JSON has no -Infinity."""


class Extras(Struct, frozen=True):
    """What a caller asked to see. It is kept with a stream that can be resumed."""

    token_ids: bool = False
    """The ids of the prompt and of the answer (`return_token_ids`)."""
    tokens_as_ids: bool = False
    """Tokens beside their logprobs as `token_id:5` instead of as text (`return_tokens_as_token_ids`)."""
    echo: bool = False
    """The prompt before the answer."""
    prompt_logprobs: int | None = None
    """The prompt's logprobs, with this many of the most likely tokens; None: not in a field of their own."""


NO_EXTRAS = Extras()


def finite(logprob: float) -> float:
    """The logprob as OpenAI gives it: at least `LOWEST_LOGPROB`."""
    return max(logprob, LOWEST_LOGPROB)


def prompt_logprobs(
    token_ids: Sequence[int], scores: PromptLogprobs, top: int, tokens: TokenTexts
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token of the prompt those of the token itself and of the `top` likeliest ones.

    The first token has none.
    """
    told: list[dict[str, Any] | None] = [None]
    for token_id, (own, rank) in zip(token_ids[1:], scores.tokens(), strict=True):
        listed = {token_id: (own.logprob, rank)}
        for place, (other, logprob) in enumerate(own.top[:top], 1):
            listed.setdefault(other, (logprob, place))
        told.append(
            {
                str(other): {"logprob": finite(logprob), "rank": place, "decoded_token": tokens.text(other)}
                for other, (logprob, place) in listed.items()
            }
        )
    return told
