"""Tokens from logits: the generator's known answers, filters against transformers' own, and independence of rows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from exploring import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torch.profiler import ProfilerActivity, profile
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serve_app.core import Fingerprint, GenerationRequest, SamplingParams
from serve_app.engine.masks import Masks
from serve_app.engine.sampling import (
    NO_TOKEN,
    NOT_A_NUMBER,
    TOP_P_CANDIDATES,
    Sampler,
    inverse_cdf,
    philox4x32,
    scratch_bytes,
    uniforms,
)
from serve_app.engine.sequence import Sequence

VOCAB = 1000


def sequence(
    params: SamplingParams, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **fields
) -> Sequence:
    request = GenerationRequest("r", Fingerprint("x"), prompt, params, 100, output_token_ids=output, **fields)
    return Sequence(request, 1)


def logits(rows: int = 1, seed: int = 0, scale: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def drawn(params: SamplingParams, row: torch.Tensor, draws: int = 2000) -> set[int]:
    """The ids that a row gives over many positions."""
    sequences = [sequence(params, output=(0,) * 0) for _ in range(draws)]
    for position, one in enumerate(sequences):
        one.token_ids.extend([1] * position)
    return {sampled.token_id for sampled in Sampler().sample(row.repeat(draws, 1), sequences)}


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # The known-answer vectors that come with Random123 (philox4x32-10).
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_its_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox4x32(np.array([counter], dtype=np.uint64), np.array([key], dtype=np.uint64))
    assert words[0].tolist() == expected


def test_draws_are_uniform_and_differ_by_seed_choice_and_position() -> None:
    draws = uniforms([5] * 20_000, [0] * 20_000, range(20_000))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8, "chi squared, 19 degrees of freedom, p = 0.001"
    three = uniforms([5, 6, 5], [0, 0, 1], [7, 7, 7])
    assert len({*three.tolist(), uniforms([5], [0], [8])[0]}) == 4
    assert uniforms([2**64 - 1], [0], [7])[0] != uniforms([2**63 - 1], [0], [7])[0]


def test_greedy_takes_the_lowest_id_on_a_tie() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, [7, 400, 999]] = 5.0
    assert Sampler().sample(row, [sequence(SamplingParams(seed=1, temperature=0))])[0].token_id == 7


def test_the_distribution_is_the_softmax() -> None:
    row = logits(vocab=8, scale=1.0)
    expected = row.softmax(-1)[0].numpy()
    draws = 20_000
    probs = row.softmax(-1).repeat(draws, 1)
    ids = inverse_cdf(probs, torch.from_numpy(uniforms([3] * draws, [0] * draws, range(draws))))
    counts = np.bincount(ids.numpy(), minlength=8)
    assert ((counts - draws * expected) ** 2 / (draws * expected)).sum() < 24.3, "chi squared, 7 degrees, p = 0.001"


@settings(max_examples=cases(30, exploring=300), deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 50, 2000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
)
def test_filters_keep_what_transformers_keeps(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = logits(seed=seed)
    scores = TemperatureLogitsWarper(temperature)(None, row.clone())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    expected = scores[0].softmax(-1)
    params = SamplingParams(seed=1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = drawn(params, row, 300)
    assert found <= set(torch.nonzero(expected > 0)[:, 0].tolist())
    # The draw goes through the same distribution in vocabulary order, so the ids themselves agree.
    draws = torch.from_numpy(uniforms([1] * 300, [0] * 300, range(300)))
    reference = inverse_cdf(expected.repeat(300, 1), draws)
    ids = [Sampler().sample(row.clone(), [_at(params, i)])[0].token_id for i in range(0, 300, 10)]
    assert sum(a == b for a, b in zip(ids, reference[::10].tolist(), strict=True)) >= 29, "one rounding at an edge"


def _at(params: SamplingParams, position: int) -> Sequence:
    one = sequence(params)
    one.token_ids.extend([1] * position)
    return one


def test_top_p_of_a_flat_row_needs_more_than_the_candidates() -> None:
    vocab = 4 * TOP_P_CANDIDATES
    row = torch.linspace(0.001, 0.0, vocab)[None]
    found = drawn(SamplingParams(seed=1, top_p=0.75), row, 6000)
    assert max(found) < 0.76 * vocab
    assert max(found) > 0.73 * vocab


def test_repetition_penalty_is_transformers_own() -> None:
    row, ids = logits(), (3, 900, 3, 17)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([ids]), row.clone())
    one = sequence(SamplingParams(seed=0, temperature=0, repetition_penalty=1.7), ids[:2], ids[2:])
    Sampler().sample(row, [one])
    assert torch.equal(row, expected)


def test_presence_and_frequency_count_the_output_only() -> None:
    row = torch.zeros(1, VOCAB)
    one = sequence(SamplingParams(seed=0, presence_penalty=0.5, frequency_penalty=0.25), (9,), (4, 4, 5))
    Sampler().sample(row, [one])
    assert row[0, [9, 4, 5, 6]].tolist() == [0.0, -1.0, -0.75, 0.0]


def test_bias_and_min_tokens() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 8] = 50.0
    params = SamplingParams(seed=0, temperature=0, logit_bias=((12, 20.0), (13, -5.0)), min_tokens=2)
    early = sequence(params, output=(1,), stop_token_ids=(8,))
    late = sequence(params, output=(1, 1), stop_token_ids=(8,))
    sampled = Sampler().sample(row.repeat(2, 1), [early, late])
    assert [s.token_id for s in sampled] == [12, 8]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    row = logits()
    expected = row[0].log_softmax(-1)
    params = SamplingParams(seed=0, temperature=0, logprobs=3, logit_bias=((5, 100.0),))
    sampled = Sampler().sample(row.clone(), [sequence(params)])[0]
    assert sampled.token_id == 5
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == pytest.approx(expected[5].item())
    top = expected.topk(3)
    assert [token for token, _ in sampled.logprobs.top] == top.indices.tolist()


def masks_of(allowed: dict[int, list[int]], vocab: int) -> Masks:
    """Row -> the ids that may come in it."""
    words = np.zeros((len(allowed), -(-vocab // 32) + 1), dtype=np.uint32)
    for place, ids in enumerate(allowed.values()):
        for token_id in ids:
            words[place, token_id // 32] |= np.uint32(1 << token_id % 32)
    return Masks(list(allowed), words, [row for row, ids in allowed.items() if not ids])


@pytest.mark.parametrize("vocab", [VOCAB, 1024, 40])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [1, 3, 4]])
def test_a_mask_comes_before_every_choice_and_leaves_the_logprobs(vocab: int, rows: list[int]) -> None:
    varied = [
        SamplingParams(seed=1, temperature=0, logprobs=2),
        SamplingParams(seed=2, temperature=1.3, logprobs=0),
        SamplingParams(seed=3, top_k=1, repetition_penalty=1.9),
        SamplingParams(seed=4, top_p=0.1, presence_penalty=2.0),
        SamplingParams(seed=5, min_p=0.9, logit_bias=((0, 100.0),)),
        SamplingParams(seed=6, temperature=0, min_tokens=90),
    ]
    allowed = {row: [3 + row, 17, 31 + row, vocab - 1] for row in rows}
    given, by_hand = logits(6, seed=3, vocab=vocab), logits(6, seed=3, vocab=vocab)
    for row, ids in allowed.items():
        others = torch.ones(vocab, dtype=torch.bool)
        others[ids] = False
        by_hand[row, others] = float("-inf")
    sequences = [sequence(params, output=(4, 4, 9)) for params in varied]
    unmasked = Sampler().sample(given.clone(), sequences)
    found = Sampler().sample(given.clone(), sequences, masks_of(allowed, vocab))
    expected = Sampler().sample(by_hand, sequences)
    assert [one.token_id for one in found] == [one.token_id for one in expected]
    for row in range(6):
        if row not in rows:
            assert found[row] == unmasked[row]
            continue
        assert found[row].token_id in allowed[row]
        if (told := found[row].logprobs) is not None:
            own = given[row].log_softmax(-1)
            assert told.logprob == own[found[row].token_id].item()
            assert [token_id for token_id, _ in told.top] == own.topk(len(told.top)).indices.tolist()


def test_a_row_that_may_have_no_token_has_none_and_one_without_numbers_stays_that() -> None:
    rows = logits(4)
    rows[0, 5] = float("nan")
    rows[2, 5] = float("nan")
    rows[3, 5] = float("inf")
    masks = masks_of({0: [], 1: [], 2: [7], 3: [7]}, VOCAB)
    for temperature in (0.0, 1.0):
        params = SamplingParams(seed=1, temperature=temperature, logprobs=1)
        found = Sampler().sample(rows.clone(), [sequence(params)] * 4, masks)
        assert [one.token_id for one in found] == [NO_TOKEN, NO_TOKEN, NOT_A_NUMBER, NOT_A_NUMBER]
        assert all(one.logprobs is None for one in found)


def test_rows_that_are_not_numbers_are_refused_and_their_neighbours_are_not() -> None:
    rows = logits(4)
    rows[1, 5] = float("nan")
    rows[2, 7] = float("inf")
    rows[3, :] = float("-inf")
    for temperature in (0.0, 1.0):
        sampled = Sampler().sample(rows.clone(), [sequence(SamplingParams(seed=1, temperature=temperature))] * 4)
        assert sampled[0].token_id >= 0
        assert [s.token_id for s in sampled[1:]] == [-1, -1, -1]


def test_a_row_does_not_see_its_neighbours() -> None:
    varied = [
        SamplingParams(seed=1, temperature=0.7),
        SamplingParams(seed=2, temperature=0),
        SamplingParams(seed=3, top_p=0.8),
        SamplingParams(seed=4, top_k=7, presence_penalty=1.0),
        SamplingParams(seed=5, min_p=0.1, repetition_penalty=1.3),
        SamplingParams(seed=6, temperature=1e-3),
        SamplingParams(seed=7, top_p=0.5, top_k=100, logprobs=2),
    ]
    rows = logits(len(varied), seed=9)
    sequences = [sequence(params, output=(4, 4, 9)) for params in varied]
    together = Sampler().sample(rows.clone(), sequences)
    for i, one in enumerate(sequences):
        assert Sampler().sample(rows[i : i + 1].clone(), [one])[0] == together[i]


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": float("nan")},
        {"temperature": -1},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 2**64},
        {"repetition_penalty": 0},
        {"logprobs": -1},
        {"logit_bias": ((1, float("inf")),)},
    ],
)
def test_parameters_that_no_sampler_can_honour_do_not_exist(field: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        replace(SamplingParams(seed=0), **field)


def sampled_peak_bytes(logits: torch.Tensor, params: SamplingParams) -> int:
    """Most memory that sampling allocates at once, the logits included, as PyTorch's own profiler counts it."""
    rows = [sequence(params, output=(3,)) for _ in logits]
    masks = masks_of({row: [5] for row in range(0, len(logits), 2)}, logits.shape[1])
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        Sampler().sample(logits, rows, masks)
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return logits.nbytes + max(held, default=0)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {},
        {"top_p": 0.99},
        {"top_k": 50},
        {"top_k": 9_999},
        {"top_k": 9_999, "top_p": 0.99, "min_p": 1e-6, "logprobs": 5, "presence_penalty": 0.5},
    ],
)
def test_sampling_takes_no_more_memory_than_is_reserved_for_it(fields: dict[str, Any], flat: bool) -> None:
    """Flat logits are sorted whole for top_p; a GPU's own sort takes more than a CPU's, which is seen here."""
    rows, vocab = 24, 10_000
    logits = torch.zeros(rows, vocab) if flat else 5 * torch.randn(rows, vocab)
    taken = sampled_peak_bytes(logits, SamplingParams(**({"seed": 1, "temperature": 1.0} | fields)))
    assert taken <= scratch_bytes(rows, vocab)
    assert scratch_bytes(rows, vocab) <= 16 * logits.nbytes
    if "logprobs" in fields:
        assert taken >= 8 * logits.nbytes, "the profiler counts"


@pytest.mark.parametrize("top", [{"top_p": 0.9}, {"top_k": 5_000}])
def test_rows_that_are_sorted_in_turns_are_filtered_alike(top: dict[str, Any]) -> None:
    """Nearly flat rows, so that top_p sorts all of them."""
    logits = 1e-3 * torch.randn(19, 6_000, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(seed=7, temperature=1.0, **top)
    together = Sampler().sample(logits.clone(), [sequence(params) for _ in logits])
    alone = [Sampler().sample(row[None].clone(), [sequence(params)])[0] for row in logits]
    assert together == alone
