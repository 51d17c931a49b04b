"""The sampling kernel chooses what the sampler of tensor operations chooses, and the same in any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exploring import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core import Fingerprint, GenerationRequest, SamplingParams
from serve_app.engine.cpu.library import Kernels
from serve_app.engine.masks import Masks
from serve_app.engine.sampling import Sampler, uniforms
from serve_app.engine.sequence import Sequence

EDGE = 1e-5
"""How near a draw must be to the border of two ids for rounding to give one or the other."""


def at_position(params: SamplingParams, position: int, choice: int = 0) -> Sequence:
    sequence = Sequence(GenerationRequest("r", Fingerprint("x"), (1, 2), params, 999, choice=choice), 1)
    sequence.token_ids.extend(token % 5 for token in range(position))
    return sequence


def logits_of(rows: int, vocab: int, seed: int, scale: float) -> torch.Tensor:
    """Some of them tie, some are impossible."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    if seed % 3 == 0:
        logits = (logits * 2).round() / 2
    if seed % 4 == 1:
        logits[:, ::3] = float("-inf")
    return logits


parameters = st.builds(
    SamplingParams,
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 1e-3, 0.3, 1.0, 1.7, 30.0]),
    top_k=st.sampled_from([0, 1, 5, 50, 700, 5000]),
    top_p=st.sampled_from([0.0, 0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
)


@settings(max_examples=cases(100, exploring=1500), deadline=None)
@given(
    each=st.lists(st.tuples(parameters, st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=9),
    vocab=st.sampled_from([7, 16, 250, 1000, 3001]),
    seed=st.integers(0, 500),
    scale=st.sampled_from([0.01, 1.0, 4.0]),
)
def test_it_chooses_what_the_plain_sampler_chooses_alone_and_in_a_batch(
    kernels: Kernels, each: list[tuple[SamplingParams, int, int]], vocab: int, seed: int, scale: float
) -> None:
    logits = logits_of(len(each), vocab, seed, scale)
    sequences = [at_position(*one) for one in each]
    plain = Sampler().sample(logits.clone(), sequences)
    together = Sampler(kernels).sample(logits.clone(), sequences)
    for row, (params, position, choice) in enumerate(each):
        alone = Sampler(kernels).sample(logits[row : row + 1].clone(), sequences[row : row + 1])
        assert alone == [together[row]]
        if together[row] != plain[row]:
            assert params.temperature > 0, "greedy has no rounding"
            assert on_an_edge(
                together[row].token_id, plain[row].token_id, logits[row], sequences[row], params, position, choice
            )


def on_an_edge(
    a: int, b: int, row: torch.Tensor, sequence: Sequence, params: SamplingParams, position: int, choice: int
) -> bool:
    """Whether the draw is so near the border between the two ids that rounding decides.

    It may also decide which of several ids that are almost equally likely are the last that top-p keeps.
    """
    adjusted = row[None].clone()
    sampler = Sampler()
    sampler.sample(adjusted, [sequence])  # penalties are applied in place
    weights = _kept_weights(sampler, adjusted, params)
    cumulative = weights.cumsum(0) / weights.sum()
    draw = uniforms([params.seed], [choice], [position])[0]
    least = weights[weights > 0].min()
    unsure = weights[(weights > 0) & (weights < least * (1 + EDGE))].sum() if params.top_p < 1 else torch.tensor(0.0)
    return abs(float(cumulative[min(a, b)]) - draw) < EDGE + float(unsure / weights.sum())


def _kept_weights(sampler: Sampler, logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    scaled = (logits - logits.amax()) / params.temperature
    if params.top_k:
        sampler._keep_top_k(scaled, [params.top_k])
    probs = scaled.softmax(-1)
    if params.top_p < 1:
        sampler._keep_top_p(probs, [params.top_p])
    return probs.masked_fill(probs < probs.amax() * params.min_p, 0.0)[0].double()


def test_a_large_vocabulary_and_many_rows(kernels: Kernels) -> None:
    logits = logits_of(24, 49_152, 2, 3.0)
    kinds = [{}, {"top_p": 0.95, "temperature": 0.8}, {"top_k": 50}, {"temperature": 6.0, "top_p": 0.9}]
    sequences = [at_position(SamplingParams(seed=i, **kinds[i % 4]), i) for i in range(24)]
    assert Sampler(kernels).sample(logits.clone(), sequences) == Sampler().sample(logits.clone(), sequences)


@given(
    vocab=st.sampled_from([1, 7, 31, 32, 33, 250, 1000]),
    rows=st.lists(st.integers(0, 8), unique=True, min_size=1, max_size=9),
    spare=st.integers(0, 2),
    seed=st.integers(0, 500),
)
def test_it_masks_as_the_plain_sampler_does(
    kernels: Kernels, vocab: int, rows: list[int], spare: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    words = generator.integers(0, 2**32, (len(rows), -(-vocab // 32) + spare), dtype=np.uint32)
    masks = Masks(rows, words & generator.integers(0, 2**32, words.shape, dtype=np.uint32), [])
    logits = logits_of(9, vocab, seed, 1.0)
    logits[seed % 9, seed % vocab] = [float("nan"), float("inf"), 0.0][seed % 3]
    by_tensors, by_kernel = logits.clone(), logits.clone()
    Sampler()._mask(by_tensors, masks)
    Sampler(kernels)._mask(by_kernel, masks)
    assert torch.equal(by_tensors.nan_to_num(nan=9e9), by_kernel.nan_to_num(nan=9e9))
    for row in set(range(9)) - set(rows):
        assert torch.equal(by_kernel[row].nan_to_num(nan=9e9), logits[row].nan_to_num(nan=9e9))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [5, 1000])
def test_rows_that_are_not_numbers_are_refused_and_their_neighbours_are_not(
    kernels: Kernels, temperature: float, vocab: int
) -> None:
    rows = logits_of(5, vocab, 2, 1.0)
    rows[1, vocab - 1] = float("nan")
    rows[2, 3] = float("inf")
    rows[3, :] = float("-inf")
    rows[4, 0] = float("nan")
    sampled = Sampler(kernels).sample(rows, [at_position(SamplingParams(seed=1, temperature=temperature), 0)] * 5)
    assert sampled[0].token_id >= 0
    assert [one.token_id for one in sampled[1:]] == [-1] * 4


def test_greedy_takes_the_lowest_id_on_a_tie(kernels: Kernels) -> None:
    row = torch.zeros(1, 1000)
    row[0, [7, 400, 999]] = 5.0
    assert Sampler(kernels).sample(row, [at_position(SamplingParams(seed=1, temperature=0), 0)])[0].token_id == 7
