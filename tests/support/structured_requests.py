"""Requests with a grammar for the tiny models, and what came of them."""

from __future__ import annotations

from typing import Any

from llguidance import LLMatcher
from small_vocabulary import EOS
from tiny_models import request_for

from serve_app.core import Failure, FinishReason, GenerationRequest, SamplingParams, TokenBatch

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "null": {"enum": ["abc", "abd", None]},
        "ab": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "null", "ab"],
    "additionalProperties": False,
}


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def constrained(grammar: str, new_tokens: int = 60, seed: int = 1, **fields: Any) -> GenerationRequest:
    params = fields.pop("sampling", SamplingParams(seed=seed, temperature=1.0))
    fields = {"stop_token_ids": (EOS,)} | fields
    return request_for(fields.pop("prompt", [5, 6, 7]), new_tokens, sampling=params, constraint=grammar, **fields)


def ended(replies: list[TokenBatch | Failure]) -> tuple[list[int], FinishReason | None]:
    assert all(isinstance(reply, TokenBatch) for reply in replies), replies[-1]
    batches = [reply for reply in replies if isinstance(reply, TokenBatch)]
    return [token_id for batch in batches for token_id in batch.token_ids], batches[-1].finish_reason
