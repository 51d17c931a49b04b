from __future__ import annotations

import pytest
from fake_replica import generation_request, prompt_scores
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core import FinishReason, SamplingParams, TokenBatch, TokenLogprobs
from serve_app.generation.output_tokens import BatchError, OtherTokens, OutputTokens


def outputs(limit: int, *, with_logprobs: bool = False) -> OutputTokens:
    sampling = SamplingParams(seed=1, logprobs=0 if with_logprobs else None)
    return OutputTokens(generation_request(max_new_tokens=limit, sampling=sampling))


def test_appends_consecutive_batches() -> None:
    output = outputs(10)
    output.append(TokenBatch(0, (5, 6)))
    output.append(TokenBatch(2, (7,)))
    assert output.token_ids == [5, 6, 7]
    assert len(output) == 3


def test_drops_what_overlaps() -> None:
    output = outputs(10)
    output.append(TokenBatch(0, (5, 6, 7)))
    output.append(TokenBatch(1, (6, 7, 8)))
    output.append(TokenBatch(0, (5,)))
    assert output.token_ids == [5, 6, 7, 8]


@pytest.mark.parametrize("batch", [TokenBatch(1, (9, 7)), TokenBatch(1, (6, 9, 8)), TokenBatch(0, (9,))])
def test_refuses_a_repetition_of_another_text(batch: TokenBatch) -> None:
    output = outputs(10)
    output.append(TokenBatch(0, (5, 6, 7)))
    with pytest.raises(OtherTokens):
        output.append(batch)
    assert output.token_ids == [5, 6, 7]


def test_refuses_a_gap_and_stays_as_it_was() -> None:
    output = outputs(10)
    output.append(TokenBatch(0, (5,)))
    with pytest.raises(BatchError, match="1 to 2 are missing"):
        output.append(TokenBatch(3, (9,)))
    assert output.token_ids == [5]


def test_an_empty_batch_beyond_the_end_is_a_gap_too() -> None:
    with pytest.raises(BatchError):
        outputs(10).append(TokenBatch(1))


def test_refuses_more_than_the_limit() -> None:
    output = outputs(2)
    with pytest.raises(BatchError, match="the limit of 2 tokens"):
        output.append(TokenBatch(0, (1, 2, 3)))
    assert output.token_ids == []


def test_logprobs_stay_aligned_with_their_tokens() -> None:
    output = outputs(10, with_logprobs=True)
    first, second, third = (TokenLogprobs(-float(i)) for i in range(3))
    output.append(TokenBatch(0, (5, 6), (first, second)))
    output.append(TokenBatch(1, (6, 7), (second, third)))
    assert output.logprobs == [first, second, third]


def test_refuses_tokens_without_their_logprobs() -> None:
    output = outputs(10, with_logprobs=True)
    with pytest.raises(BatchError, match="logprobs"):
        output.append(TokenBatch(0, (5,)))
    assert (output.token_ids, output.logprobs) == ([], [])


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=30))
def test_whatever_is_sent_twice_the_output_is_the_sequence(spans: list[tuple[int, int]]) -> None:
    output = outputs(100)
    for first, length in spans:
        batch = TokenBatch(first, tuple(range(first, first + length)))
        if first > len(output):
            with pytest.raises(BatchError):
                output.append(batch)
        else:
            output.append(batch)
    assert output.token_ids == list(range(len(output)))


def test_the_prompts_logprobs_are_kept_once_and_come_with_the_first_token() -> None:
    request = generation_request(prompt_logprobs=1)
    scores = prompt_scores(request)
    output = OutputTokens(request)
    output.append(TokenBatch(0))
    output.append(TokenBatch(0, (5, 6), prompt_logprobs=scores))
    output.append(TokenBatch(1, (6, 7), prompt_logprobs=prompt_scores(generation_request(prompt_logprobs=0))))
    assert output.tokens(0, 1).prompt_logprobs == scores
    assert output.tokens(1).prompt_logprobs is None
    assert output.token_ids == [5, 6, 7]


def test_refuses_tokens_before_the_prompts_logprobs_and_those_of_another_prompt() -> None:
    request = generation_request(prompt_logprobs=1)
    output = OutputTokens(request)
    other = prompt_scores(generation_request(prompt_token_ids=(1, 2), prompt_logprobs=1))
    for batch in (TokenBatch(0, (5,)), TokenBatch(0, (5,), prompt_logprobs=other)):
        with pytest.raises(BatchError, match="the prompt's logprobs"):
            output.append(batch)
    assert output.token_ids == []


def test_an_output_without_tokens_is_complete_once_the_prompts_logprobs_are_there() -> None:
    request = generation_request(max_new_tokens=0, prompt_logprobs=0)
    output = OutputTokens(request)
    assert not output.complete()
    output.append(TokenBatch(0, prompt_logprobs=prompt_scores(request)))
    assert output.complete()
    assert output.finish_reason is FinishReason.LENGTH
    assert OutputTokens(generation_request(max_new_tokens=0)).complete()


def test_a_replica_tells_why_an_output_within_a_grammar_ended_at_the_limit() -> None:
    request = generation_request(max_new_tokens=2, constraint='start: "ab"', stop_token_ids=(9,))
    output = OutputTokens(request)
    output.append(TokenBatch(0, (5, 6)))
    assert not output.complete()
    output.append(TokenBatch(2, finish_reason=FinishReason.STOP))
    assert output.complete()
    stopped = OutputTokens(request)
    stopped.append(TokenBatch(0, (5, 9)))
    assert stopped.complete()
    assert stopped.finish_reason is FinishReason.STOP
