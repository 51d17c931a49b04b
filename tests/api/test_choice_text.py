from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.api.choice_text import ChoiceText
from serve_app.chat.detokenizer import Detokenizer
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.messages import FinishReason, TokenBatch, TokenLogprobs

PER_EXAMPLE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


def choice(tokenizer: ChatTokenizer, stops: list[str], stop_ids: frozenset[int] = frozenset()) -> ChoiceText:
    return ChoiceText(0, Detokenizer(tokenizer), stops, stop_ids)


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
        assert len(delta.texts) == len(delta.token_ids)
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
    assert (delta.texts, delta.finish_reason, delta.logprobs) == (("a", "b", ""), FinishReason.STOP, logprobs[:3])


def test_an_unfinished_character_at_the_end_is_shown_as_such(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode_text("\U0001fae0", add_bos=False, parse_special=False)
    assert len(ids) > 1
    text = choice(tokenizer, [])
    delta = text.push(TokenBatch(0, tuple(ids[:-1]), finish_reason=FinishReason.LENGTH))
    assert "".join(delta.texts) == tokenizer.decode(ids[:-1])
