"""OpenAI's usage object, which the native format uses too."""

from __future__ import annotations

from serve_app.generation.completion import Usage


def usage_document(usage: Usage) -> dict[str, object]:
    """As JSON."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
