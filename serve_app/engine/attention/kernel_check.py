"""Compares an attention kernel with the plain path on this device, before it may serve.

The spans cover the cases of serving: several sequences, scattered and contiguous pages, decodes beside prefill chunks,
contexts of many pages, and a window shorter than the context. Unused slots hold large numbers, so that reading one
changes the output visibly.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from serve_app.engine.attention.base import AttentionBackend, AttentionParams, Span, contiguous_runs
from serve_app.engine.attention.plain import PlainAttention
from serve_app.engine.engine_error import first_line
from serve_app.engine.kv_cache import LayerShape

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest absolute difference on unit-normal values. Wrong pages or masks differ by 0.3 and more."""
LONG_TOKENS = 1500
"""Tokens of a long context: enough for several passes of every kernel's loop over the keys, and for splitting it."""
_STRAY = 30.0


def check_attention(
    backend: AttentionBackend,
    layer: LayerShape,
    query_heads: int,
    params: AttentionParams,
    page_tokens: int | None = None,
    *,
    long_tokens: int = LONG_TOKENS,
) -> str | None:
    """Compare `backend` with the plain path on random values; returns what is wrong, or None.

    A kernel that raises is wrong too: the caller uses another kernel either way.

    Args:
        page_tokens: size of the pages to serve with; by default the kernel's own.
        long_tokens: length of the long contexts, or five pages if that is more. Triton's interpreter is given less.
    """
    page = page_tokens or backend.page_tokens
    spans = _spans(page, long_tokens)
    if params.sliding_window is not None:
        params = AttentionParams(params.scaling, min(params.sliding_window, page + 5), params.softcap)
    generator = torch.Generator().manual_seed(0)
    plain = _caches(spans, page, layer)
    keys, values = _caches(spans, page, layer)
    slots, key, value = _contents(spans, layer, generator)
    PlainAttention().write(*plain, slots, key, value)
    tokens = sum(span.query_len for span in spans)
    query = torch.randn(tokens, query_heads, layer.key_dim, generator=generator).to(layer.device, layer.dtype)
    # Kernels may compute a step that has only decodes in another way.
    decodes = [replace(span, query_start=i) for i, span in enumerate(s for s in spans if s.query_len == 1)]
    steps = [(step, query[: sum(span.query_len for span in step)]) for step in (spans, decodes)]
    right = [PlainAttention().attend(rows, *plain, params, step) for step, rows in steps]
    try:
        backend.write(keys, values, slots, key, value)
        _wait_for(layer.device)
        for (step, rows), expected in zip(steps, right, strict=True):
            found = backend.attend(rows, keys, values, params, backend.prepare(step, layer.device))
            _wait_for(layer.device)
            if (complaint := _compare(found, expected, layer.dtype)) is not None:
                return complaint
    except Exception as error:  # noqa: BLE001 - compilers raise any type; the caller reports it
        said = f"it failed: {first_line(error)}"
        missing = backend.missing()
        return said if missing is None else f"{missing} ({said})"
    return None


def _wait_for(device: torch.device) -> None:
    """Raise the errors of earlier launches: a launch returns at once, and its error comes with a later call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compare(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    if found.shape != expected.shape:
        return f"its output has shape {list(found.shape)} instead of {list(expected.shape)}"
    difference = (found.float() - expected.float()).abs().max().item()
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if not difference <= tolerance:  # NaN too
        return f"its output differs from the plain path by {difference:.2g} (at most {tolerance:g} is allowed)"
    return None


def _spans(page: int, long_tokens: int) -> list[Span]:
    # (queries, keys, pages scattered?)
    wanted = [
        (1, 1, False),
        (5, 5, False),
        (1, page + 3, True),
        (page // 2 + 1, 3 * page + 7, True),
        (1, max(long_tokens, 5 * page), False),
        (40, max(4 * long_tokens // 5, 4 * page + 1), True),
        (page + 2, page + 2, True),
    ]
    spans, start, next_page = [], 0, 1
    for query_len, kv_len, scattered in wanted:
        count = -(-kv_len // page)
        step = 2 if scattered else 1
        pages = list(range(next_page, next_page + count * step, step))
        next_page += count * step
        if scattered:
            pages.reverse()
        spans.append(Span(start, query_len, kv_len, contiguous_runs(pages, kv_len, page), tuple(pages)))
        start += query_len
    return spans


def _caches(spans: list[Span], page: int, layer: LayerShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values filled with `_STRAY`, with an unused page before and after those of the spans."""
    pages = max(max(span.pages) for span in spans) + 2
    shapes = ((pages, page, layer.kv_heads, dim) for dim in (layer.key_dim, layer.value_dim))
    keys, values = (torch.full(shape, _STRAY, dtype=layer.dtype, device=layer.device) for shape in shapes)
    return keys, values


def _contents(
    spans: list[Span], layer: LayerShape, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots of all tokens of the spans, and a random key and value for each."""
    slots = torch.tensor([slot for span in spans for first, size in span.runs for slot in range(first, first + size)])
    key, value = (
        torch.randn(len(slots), layer.kv_heads, dim, generator=generator).to(layer.device, layer.dtype)
        for dim in (layer.key_dim, layer.value_dim)
    )
    return slots.to(layer.device), key, value
