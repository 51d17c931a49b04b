"""Bytes and tokens as people read them, and what a KV cache of so many tokens means for streams.

Pure functions of numbers; the server's card and the plan of `serve-app check` are told in the same words.
"""

from __future__ import annotations


def size(bytes_: int) -> str:
    """1073741824 -> '1.07 GB'."""
    if bytes_ >= 10**9:
        return f"{bytes_ / 10**9:.2f} GB"
    return f"{bytes_ / 10**6:.0f} MB"


def streams(kv_tokens: int, context_tokens: int, max_running: int) -> str:
    """How many streams of how many tokens a replica holds: at the full context, and with all its places taken."""
    longest = min(context_tokens, kv_tokens)
    alone = min(kv_tokens // longest, max_running) if longest else 0
    shared = min(kv_tokens // max_running, context_tokens)
    text = f"{alone} {'stream' if alone == 1 else 'streams'} of {longest:,} tokens"
    if alone < max_running:
        text += f", or {max_running} of {shared:,}"
    return text
