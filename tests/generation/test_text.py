from __future__ import annotations

from itertools import accumulate

import pytest
from exploring import cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.chat.answers import AnswerFormat, new_parser
from serve_app.chat.detokenizer import new_detokenizer
from serve_app.chat.parts import ArgumentsPart, CallPart, TextPart
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import FinishReason, TokenBatch, TokenLogprobs
from serve_app.generation.text import ChoiceText, TokenLogprob

PER_EXAMPLE = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=cases(20, exploring=300), deadline=None
)


def choice(tokenizer: ChatTokenizer, stops: list[str], stop_ids: frozenset[int] = frozenset()) -> ChoiceText:
    return ChoiceText(0, new_detokenizer(tokenizer), stops, stop_ids)


@PER_EXAMPLE
@given(
    ids=st.lists(st.integers(0, 400), min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 5), min_size=40, max_size=40),
    stops=st.lists(st.text(alphabet="aeo thn", min_size=1, max_size=3), max_size=3),
    together=st.booleans(),
)
def test_the_text_does_not_depend_on_the_batches(
    tokenizer: ChatTokenizer, ids: list[int], cuts: list[int], stops: list[str], together: bool
) -> None:
    whole = tokenizer.decode(ids)
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    text = choice(tokenizer, stops)
    pieces: list[str] = []
    counted = first = 0
    reason = None
    for size in cuts:
        batch = tuple(ids[first : first + size])
        if not batch:
            break
        last = together and first + size >= len(ids)
        delta = text.push(TokenBatch(first, batch, finish_reason=FinishReason.LENGTH if last else None))
        rest = delta.texts[len(delta.token_ids) :]
        assert not rest or (last and len(rest) == 1 and rest[0])
        first += size
        counted += len(delta.token_ids)
        pieces.extend(delta.texts)
        if (reason := delta.finish_reason) is not None:
            break
    if reason is None:
        delta = text.push(TokenBatch(len(ids), finish_reason=FinishReason.LENGTH))
        pieces.extend(delta.texts)
        reason = delta.finish_reason
    if ends:
        assert "".join(pieces) == whole[: min(ends)[1]]
        assert reason is FinishReason.STOP
    else:
        assert "".join(pieces) == whole
        assert (reason, counted) == (FinishReason.LENGTH, len(ids))
    assert text.tokens == counted


@pytest.mark.parametrize(("answer", "stops"), [("a🙂", []), ("over the l", ["lazy"]), ("over", [])])
@pytest.mark.parametrize("cut", [0, 1])
def test_the_text_of_each_token_does_not_depend_on_when_the_end_comes(
    tokenizer: ChatTokenizer, answer: str, stops: list[str], cut: int
) -> None:
    """A resumable stream takes the end after the last token, others with it: their events are the same."""
    ids = tuple(tokenizer.encode_text(answer, add_bos=False, parse_special=False))
    ids = ids[: len(ids) - cut]
    with_it = choice(tokenizer, stops).push(TokenBatch(0, ids, finish_reason=FinishReason.LENGTH))
    later = choice(tokenizer, stops)
    first, end = later.push(TokenBatch(0, ids)), later.push(TokenBatch(len(ids), finish_reason=FinishReason.LENGTH))
    assert with_it.texts == first.texts + end.texts


def test_stop_ids_count_and_have_no_text(tokenizer: ChatTokenizer) -> None:
    (a,) = tokenizer.encode_text("a", add_bos=False, parse_special=False)
    (b,) = tokenizer.encode_text("b", add_bos=False, parse_special=False)
    text = choice(tokenizer, [], frozenset({b}))
    delta = text.push(TokenBatch(0, (a, b), finish_reason=FinishReason.STOP))
    assert (delta.token_ids, delta.texts, text.tokens) == ((a, b), ("a", ""), 2)


def test_what_comes_after_a_stop_string_in_its_batch_is_dropped(tokenizer: ChatTokenizer) -> None:
    ids = [tokenizer.encode_text(c, add_bos=False, parse_special=False)[0] for c in "abcd"]
    logprobs = tuple(TokenLogprobs(-float(i)) for i in range(4))
    text = choice(tokenizer, ["c"])
    delta = text.push(TokenBatch(0, tuple(ids), logprobs))
    assert (delta.texts, delta.finish_reason) == (("a", "b", ""), FinishReason.STOP)
    assert delta.logprobs == (TokenLogprob(ids[0], 0, logprobs[0]), TokenLogprob(ids[1], 1, logprobs[1]))
    assert text.tokens == 3


@PER_EXAMPLE
@given(
    words=st.lists(st.text(alphabet="abc \U0001fae0", min_size=1, max_size=4) | st.integers(0, 400), min_size=1),
    size=st.integers(2, 7),
    stops=st.lists(st.text(alphabet="abc \U0001fae0", min_size=2, max_size=4), max_size=3),
)
def test_logprobs_tell_what_the_text_tells_and_no_more(
    tokenizer: ChatTokenizer, words: list[str | int], size: int, stops: list[str]
) -> None:
    """A token at a time as in a resumable stream, and in batches: the same tokens, never ahead of their text."""
    ids: list[int] = []
    for word in words:
        ids += [word] if isinstance(word, int) else tokenizer.encode_text(word, add_bos=False, parse_special=False)

    def told(size: int) -> tuple[list[TokenLogprob], str]:
        text, found, shown = choice(tokenizer, stops), list[TokenLogprob](), ""
        for first in range(0, len(ids), size):
            batch = tuple(ids[first : first + size])
            last = FinishReason.LENGTH if first + size >= len(ids) else None
            logprobs = tuple(TokenLogprobs(-float(first + n)) for n in range(len(batch)))
            delta = text.push(TokenBatch(first, batch, logprobs, last))
            assert delta.logprobs is not None
            found += delta.logprobs
            shown += "".join(delta.texts)
            assert shown.startswith(tokenizer.decode([token.token_id for token in found]).rstrip("\ufffd"))
            if delta.finish_reason is not None:
                break
        return found, shown

    found, shown = told(1)
    assert told(size) == (found, shown)
    assert [token.token_id for token in found] == ids[: len(found)]
    assert [token.logprobs.logprob for token in found] == [-float(n) for n in range(len(found))]
    whole = tokenizer.decode(ids)
    if shown == whole:
        assert len(found) == len(ids)
    else:
        detokenizer = new_detokenizer(tokenizer)
        ends = [0, *accumulate(len(detokenizer.push(token_id)) for token_id in ids)]
        told_chars = ends[len(found)]
        of_the_next = next((end for end in ends[len(found) :] if end > told_chars), len(whole))
        assert told_chars <= len(shown) < of_the_next
    assert all(0 <= token.offset <= len(shown) for token in found)


def test_the_logprobs_of_held_text_wait_for_it(tokenizer: ChatTokenizer) -> None:
    x, e, n, d, y = (tokenizer.encode_text(c, add_bos=False, parse_special=False)[0] for c in "xENDy")
    logprobs = (TokenLogprobs(-1.0),)

    def offsets(*token_ids: int) -> list[list[int] | None]:
        text = choice(tokenizer, ["END"])
        deltas = [text.push(TokenBatch(at, (token_id,), logprobs)) for at, token_id in enumerate(token_ids)]
        return [None if delta.logprobs is None else [token.offset for token in delta.logprobs] for delta in deltas]

    assert offsets(x, e, n, y) == [[0], [], [], [1, 2, 3]]
    assert offsets(x, e, n, d) == [[0], [], [], []]


def test_the_parts_of_a_character_are_told_with_it_or_not_at_all(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode_text("\U0001fae0", add_bos=False, parse_special=False)
    batch = TokenBatch(0, tuple(ids), tuple(TokenLogprobs(-1.0) for _ in ids), FinishReason.LENGTH)
    assert choice(tokenizer, ["\U0001fae0"]).push(batch).logprobs == ()
    whole = choice(tokenizer, []).push(batch).logprobs
    assert whole is not None
    assert [token.token_id for token in whole] == ids
    cut = choice(tokenizer, []).push(TokenBatch(0, batch.token_ids[:-1], batch.logprobs, FinishReason.LENGTH)).logprobs
    assert cut is not None
    assert [token.token_id for token in cut] == ids[:-1]


def test_an_unfinished_character_at_the_end_is_shown_as_such(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode_text("\U0001fae0", add_bos=False, parse_special=False)
    assert len(ids) > 1
    text = choice(tokenizer, [])
    delta = text.push(TokenBatch(0, tuple(ids[:-1]), finish_reason=FinishReason.LENGTH))
    assert "".join(delta.texts) == tokenizer.decode(ids[:-1])


CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


def calling(tokenizer: ChatTokenizer, *, single_call: bool = False, stops: tuple[str, ...] = ()) -> ChoiceText:
    answer = AnswerFormat("</think>", "<think>", "hermes", {"f": {}}, single_call)
    return ChoiceText(0, new_detokenizer(tokenizer), stops, frozenset(), parser=new_parser(answer))


def test_an_answer_that_calls_ends_with_tool_calls_unless_it_was_cut(tokenizer: ChatTokenizer) -> None:
    ids = tuple(tokenizer.encode_text(f"Hi. {CALL}", add_bos=False, parse_special=False))
    whole = calling(tokenizer).push(TokenBatch(0, ids, finish_reason=FinishReason.STOP))
    assert whole.parts == (TextPart("Hi."), CallPart(0, "f"), ArgumentsPart(0, "{}"))
    assert whole.finish_reason is FinishReason.TOOL_CALLS
    cut = calling(tokenizer).push(TokenBatch(0, ids, finish_reason=FinishReason.LENGTH))
    assert cut.finish_reason is FinishReason.LENGTH
    stopped = calling(tokenizer, stops=("</tool",)).push(TokenBatch(0, ids, finish_reason=FinishReason.STOP))
    assert (stopped.finish_reason, stopped.stop) == (FinishReason.STOP, "</tool")


def test_an_answer_that_may_have_one_call_ends_at_the_same_token_in_every_batch(tokenizer: ChatTokenizer) -> None:
    ids = tuple(tokenizer.encode_text(f"{CALL}\n{CALL} and more", add_bos=False, parse_special=False))
    whole = calling(tokenizer, single_call=True)
    delta = whole.push(TokenBatch(0, ids, finish_reason=FinishReason.STOP))
    assert delta.parts == (CallPart(0, "f"), ArgumentsPart(0, "{}"))
    assert delta.finish_reason is FinishReason.TOOL_CALLS
    single = calling(tokenizer, single_call=True)
    for index, token_id in enumerate(ids):
        if single.push(TokenBatch(index, (token_id,))).finish_reason is not None:
            break
    assert single.tokens == whole.tokens == len(delta.token_ids) == index + 1


def test_reasoning_tokens_do_not_depend_on_the_batches(tokenizer: ChatTokenizer) -> None:
    ids = tuple(tokenizer.encode_text("<think>Well, hm.</think>Yes.", add_bos=False, parse_special=False))
    whole, single = calling(tokenizer), calling(tokenizer)
    whole.push(TokenBatch(0, ids, finish_reason=FinishReason.STOP))
    for index, token_id in enumerate(ids):
        single.push(TokenBatch(index, (token_id,)))
    assert 0 < single.reasoning_tokens == whole.reasoning_tokens < len(ids)
