"""A `ReplicaClient` whose model is random and obeys the grammar of its request, as a real engine's sampler does.

Its tokens are a function of the seed, the choice and the position, so a second attempt continues as the first would
have.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from fake_replica import card
from llguidance import LLMatcher

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import (
    Failure,
    FailureCode,
    FinishReason,
    GenerationRequest,
    GenerationStats,
    LoadStage,
    ModelCard,
    Reply,
    TokenBatch,
    TokenLogprobs,
)
from serve_app.generation.replica import ReplicaLost
from serve_app.grammar import GrammarError, Vocabulary, compile_grammar

CLOSERS = ('"', "}", "]", ")", ">", ".", "\n")
"""What ends something, the innermost first. A random model rarely does, so it is preferred."""


class ConstrainedModel:
    """Chooses tokens at random among those that the grammar allows, and comes to an end."""

    def __init__(self, vocabulary: Vocabulary, *, calm: int = 40, words: Sequence[int] = ()) -> None:
        """`calm`: after so many tokens it closes what it can. `words`: ids to answer with where there is no grammar;
        none: printable ones."""
        self._vocabulary = vocabulary
        self._calm = calm
        texts = {id_: vocabulary.tokenizer.decode_str([id_]) for id_ in range(vocabulary.accept_id)}
        plain = [id_ for id_, text in texts.items() if text.isascii() and text.isprintable() and not _is_mark(text)]
        self._words = list(words) or plain
        self._closers = {id_: CLOSERS.index(text[0]) for id_, text in texts.items() if text[:1] in CLOSERS}

    def matcher(self, request: GenerationRequest) -> LLMatcher | None:
        """At the end of the request's output so far. Raises `GrammarError`."""
        if not request.constraint:
            return None
        matcher = compile_grammar(self._vocabulary, request.constraint)
        if not matcher.consume_tokens([id_ for id_ in request.output_token_ids if id_ not in request.stop_token_ids]):
            raise GrammarError(f"the output does not match the grammar: {matcher.get_error()}")
        return matcher

    def token(self, request: GenerationRequest, matcher: LLMatcher | None, index: int) -> int:
        """The token at position `index`. Raises `GrammarError` where the grammar allows none."""
        chance = random.Random(f"{request.sampling.seed} {request.choice} {index}")
        stops = [id_ for id_ in request.stop_token_ids if index >= request.sampling.min_tokens]
        if matcher is None:
            ends = stops and chance.random() < (1.0 if index > self._calm else 0.05)
            return chance.choice(stops if ends else self._words)
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [id_ for id_ in range(self._vocabulary.accept_id) if mask >> id_ & 1]
        may_end = bool(mask >> self._vocabulary.accept_id & 1)
        if may_end and stops and (not allowed or index > self._calm or chance.random() < 0.3):
            return chance.choice(stops)
        if not allowed:
            raise GrammarError(f"nothing may follow: {matcher.get_error() or 'the output has to end'}")
        closing = [id_ for id_ in allowed if id_ in self._closers]
        if closing and (index > self._calm or chance.random() < 0.3):
            return min(closing, key=lambda id_: (self._closers[id_], len(self._text(id_))))
        return chance.choice(allowed)

    def _text(self, token_id: int) -> str:
        return self._vocabulary.tokenizer.decode_str([token_id])


@dataclass
class ConstrainedReplica:
    """Answers any request with what `chooses` says; the first attempts may die after so many tokens."""

    chooses: ConstrainedModel
    state: ModelCard | LoadStage = field(default_factory=lambda: card(context_tokens=4096, kv_capacity_tokens=65536))
    dies_after: list[int] = field(default_factory=list)
    """Tokens of the first attempt after which its replica dies, then of the second, ..."""
    requests: list[GenerationRequest] = field(default_factory=list)

    async def open(self, request: GenerationRequest) -> AsyncGenerator[Reply, None]:
        self.requests.append(request)
        dies_after = self.dies_after.pop(0) if self.dies_after else None
        begun = len(request.output_token_ids)
        try:
            matcher = self.chooses.matcher(request)
            for index in range(begun, request.max_new_tokens):
                if index - begun == dies_after:
                    raise ReplicaLost("it died")
                await asyncio.sleep(0)
                token = self.chooses.token(request, matcher, index)
                finish = request.finish_reason(index + 1, token)
                if matcher is not None and finish is not FinishReason.STOP:
                    matcher.consume_token(token)
                    if matcher.is_stopped() and not matcher.is_error():
                        finish = FinishReason.STOP  # an engine ends an output that nothing can follow
                stats = GenerationStats(cached_prompt_tokens=2) if finish or index == begun else None
                yield TokenBatch(index, (token,), _logprobs(request, token), finish, stats)
                if finish is not None:
                    return
        except GrammarError as error:
            yield Failure(FailureCode.ENGINE_FAILED, str(error))

    async def model(self) -> ModelCard | LoadStage:
        return self.state


def _logprobs(request: GenerationRequest, token: int) -> tuple[TokenLogprobs, ...] | None:
    wanted = request.sampling.logprobs
    return None if wanted is None else (TokenLogprobs(-0.5, tuple((token, -0.5) for _ in range(min(wanted, 1)))),)


def _is_mark(text: str) -> bool:
    """Whether a token alone could be read as more than text."""
    return not text or "<" in text or "[" in text or "{" in text


def small_replica(vocabulary: Vocabulary, tokenizer: ChatTokenizer) -> ConstrainedReplica:
    """A replica of a random model with the ids of `tokenizer`."""
    state = card(vocab_size=tokenizer.vocab_size, context_tokens=4096, kv_capacity_tokens=65536)
    return ConstrainedReplica(ConstrainedModel(vocabulary), state)
