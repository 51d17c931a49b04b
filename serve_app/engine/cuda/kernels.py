"""Triton kernels of attention over paged keys and values: `store` writes them, `attend` reads them, `combine` joins
the parts of a long context that several programs read. Every number about a step comes from tensors, so that a
captured launch serves any step of its size. The online softmax is Milakov and Gimelshein's (arXiv:1805.02867), the
split of a context FlashDecoding's (Dao et al. 2023).
"""

import triton
import triton.language as tl


@triton.jit
def store(
    key, value, slots, keys, values, key_row, key_head, value_row, value_head,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies a token's key and value of one head to the token's slot. One program a token and head."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = tl.load(slots + row) * HEADS + head
    dims = tl.arange(0, KEY_BLOCK)
    found = tl.load(key + row * key_row + head * key_head + dims, mask=dims < KEY_DIM)
    tl.store(keys + place * KEY_DIM + dims, found, mask=dims < KEY_DIM)
    dims = tl.arange(0, VALUE_BLOCK)
    found = tl.load(value + row * value_row + head * value_head + dims, mask=dims < VALUE_DIM)
    tl.store(values + place * VALUE_DIM + dims, found, mask=dims < VALUE_DIM)


@triton.jit
def attend(
    query, keys, values, output, parts, sums, blocks, pages, scale, softcap, query_row, query_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, HEADS_EACH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Attends. One program a block of queries, group of heads and part of the context.

    A row of `blocks` is (first row, queries, position of the first query, where its pages begin in `pages`). A block
    without a context (position + queries = 0) gives zeros. Scores are in units of log2. With one part the result goes
    to `output` `[rows, heads, value_dim]`, with several to `parts` `[rows, heads, parts, value_dim]` and their maxima
    and sums to `sums` `[rows, heads, parts, 2]`.
    """
    block = blocks + tl.program_id(0) * 4
    first_row = tl.load(block)
    queries = tl.load(block + 1).to(tl.int32)
    position = tl.load(block + 2).to(tl.int32)
    first_page = tl.load(block + 3)
    if queries == 0:
        return
    group: tl.constexpr = HEADS // KV_HEADS
    programs: tl.constexpr = (group + HEADS_EACH - 1) // HEADS_EACH
    kv_head = tl.program_id(1) // programs
    lane = tl.arange(0, ROWS)
    of_group = (tl.program_id(1) % programs) * HEADS_EACH + lane % HEADS_EACH
    nth = lane // HEADS_EACH
    valid = (nth < queries) & (of_group < group)
    row = first_row + nth
    head = kv_head * group + of_group
    key_dims = tl.arange(0, KEY_BLOCK)
    value_dims = tl.arange(0, VALUE_BLOCK)
    q = tl.load(
        query + row[:, None] * query_row + head[:, None] * query_head + key_dims[None, :],
        mask=valid[:, None] & (key_dims[None, :] < KEY_DIM),
        other=0.0,
    )
    seen = position + nth

    end = position + queries
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0) // TILE
    last = (end + TILE - 1) // TILE
    if SPLITS > 1:
        each = (last - first + SPLITS - 1) // SPLITS
        first = first + tl.program_id(2) * each
        last = tl.minimum(first + each, last)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_of_values = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    for tile in range(first, last):
        place = tile * TILE + tl.arange(0, TILE)
        exists = place < end
        page = tl.load(pages + first_page + place // PAGE, mask=exists, other=0)
        slot = ((page * PAGE + place % PAGE) * KV_HEADS + kv_head).to(tl.int64)
        k = tl.load(
            keys + slot[None, :] * KEY_DIM + key_dims[:, None],
            mask=exists[None, :] & (key_dims[:, None] < KEY_DIM),
            other=0.0,
        )
        v = tl.load(
            values + slot[:, None] * VALUE_DIM + value_dims[None, :],
            mask=exists[:, None] & (value_dims[None, :] < VALUE_DIM),
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP:
            # softcap * tanh(x / softcap), in units of log2
            scores = (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0) * softcap * 1.4426950408889634
        sees = place[None, :] <= seen[:, None]
        if WINDOW > 0:
            sees = sees & (place[None, :] > seen[:, None] - WINDOW)
        scores = tl.where(sees & valid[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen no key yet has no maximum to subtract.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        sum_of_values = sum_of_values * shrink[:, None]
        sum_of_values = tl.dot(weights.to(v.dtype), v, sum_of_values, input_precision="ieee")
        peak = new_peak

    target = row * HEADS + head
    stored = valid[:, None] & (value_dims[None, :] < VALUE_DIM)
    if SPLITS == 1:
        result = sum_of_values / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            output + target[:, None] * VALUE_DIM + value_dims[None, :], result.to(output.dtype.element_ty), mask=stored
        )
    else:
        target = target * SPLITS + tl.program_id(2)
        tl.store(parts + target[:, None] * VALUE_DIM + value_dims[None, :], sum_of_values, mask=stored)
        tl.store(sums + target * 2, peak, mask=valid)
        tl.store(sums + target * 2 + 1, total, mask=valid)


@triton.jit
def combine(
    output, parts, sums, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Adds up the parts of a context, weighted by their shares of the softmax's sum. One program a row and head."""
    target = tl.program_id(0).to(tl.int64)
    part = target * SPLITS + tl.arange(0, SPLITS)
    peaks = tl.load(sums + part * 2)
    totals = tl.load(sums + part * 2 + 1)
    peak = tl.max(peaks, 0)
    weights = tl.exp2(peaks - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights * totals, 0)
    dims = tl.arange(0, VALUE_BLOCK)
    values = tl.load(
        parts + part[:, None] * VALUE_DIM + dims[None, :],
        mask=(totals > 0.0)[:, None] & (dims[None, :] < VALUE_DIM),
        other=0.0,
    )
    result = tl.sum(values * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + target * VALUE_DIM + dims, result.to(output.dtype.element_ty), mask=dims < VALUE_DIM)
