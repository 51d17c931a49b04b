"""One path: the same question has the same answer by every protocol and in every way that an answer may come.

Random questions to a random model: whole, streamed, resumed in the middle, here or at another ingress, taken over from
an ingress that died, and over replicas that die. Text, reasoning, calls, finish reason, logprobs and usage are the same
each time, and so is what the replica was asked.

`ONE_PATH_EXAMPLES=2000 pytest tests/api/test_one_path.py` tries more questions; `--hypothesis-profile=explore` others.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from callers import GrpcCaller, HttpCaller
from constrained_replica import ConstrainedModel
from fake_replica import card
from grpc_server import grpc_server
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from protocols import (
    TOOLS,
    Chat,
    Completions,
    Event,
    Facts,
    Grpc,
    Messages,
    Native,
    Protocol,
    Question,
    Responses,
    UnreadChat,
)
from seeded_replica import FIRST_CACHED, SeededReplica
from small_tokenizers import byte_level_backend
from starlette.applications import Starlette
from transformers import PreTrainedTokenizerFast

from serve_app.api.grpc.servicer import Servicer
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import GenerationRequest, TokenBatch, decode_replies, encode_replies
from serve_app.generation.attempt_history import FailoverSettings
from serve_app.grammar import load_vocabulary
from serve_app.resume.journal_store import JournalLimits
from serve_app.resume.memory_store import MemoryJournalStore

EXAMPLES = int(os.environ.get("ONE_PATH_EXAMPLES", "25"))
PROTOCOLS: tuple[Protocol, ...] = (Chat(), UnreadChat(), Completions(), Messages(), Responses(), Native(), Grpc())

CALLING = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ ' <tool_call>{name, arguments}</tool_call><|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with Hermes' tool calls."""
TEMPLATES = {
    "calls": CALLING,
    "thinks": "{% if false %}</think>{% endif %}" + CALLING,
    "thinks at once": CALLING.replace("assistant\n", "assistant\n<think>\n") + "{# </think> #}",
}
"""Models: the last two know reasoning, and the prompt of the last one begins it."""

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "R\\u00f6me 🙂", "days": 3}}\n</tool_call>'
FRAGMENTS = [
    "The quick brown fox says ",
    "naïve café, ",
    "🙂👩‍👩‍👧",
    "\n\n",
    " ",
    "<",
    "<think>\nHm, 🙂 a greeting.\n</think>\n\n",
    "<think>",
    "</think>",
    "\n</think>\n\n",
    CALL,
    f"{CALL}\n",
    CALL.replace("get_weather", "get_time").replace(', "days": 3', ""),
    CALL.replace("get_weather", "unknown"),
    CALL.replace('"}', ""),
    CALL[:-1],
    "<tool_call>",
    "</tool_call>",
    "<tool",
]
"""Of what a model says: text, reasoning, calls, and what is nearly one of them."""
STOPS = [" fox", "🙂", "</", "tool_call", "\n\n", "naïve", "}", "Hm", "brown fox says", "get_", "👩"]
SCHEMAS = [
    {"type": "object", "properties": {"city": {"enum": ["Rome", "Röme"]}}, "required": ["city"]},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
]
TEXTS = ["Hi", "Weather in Röme?", "<|im_end|> 🙂", "Be brief."]


Piece = str | int
"""Text, or the id of any token."""


@st.composite
def questions(draw: st.DrawFn) -> Question:
    """Any question that at least two protocols can ask."""
    raw = draw(st.integers(0, 3)) == 0
    text = st.sampled_from(TEXTS)
    system = [("system", draw(text))] if draw(st.booleans()) else []
    turns = [(role, draw(text)) for role in ("user", "assistant", "user")[draw(st.sampled_from([0, 2])) :]]
    sampling: dict[str, float] = {}
    for name, values in (("temperature", [0.0, 0.5, 1.0, 1.5]), ("top_p", [0.0, 0.9]), ("presence_penalty", [0.5])):
        if draw(st.booleans()):
            sampling[name] = draw(st.sampled_from(values))
    extended = draw(st.integers(0, 3)) == 0  # what most protocols have no field for
    return Question(
        prompt=draw(text) if raw else "",
        messages=() if raw else (*system, *turns),
        max_tokens=draw(st.one_of(st.just(300), st.integers(1, 60))),
        seed=draw(st.integers(0, 2**53 - 1)),
        sampling=sampling,
        stop=tuple(draw(st.lists(st.sampled_from(STOPS), max_size=3))),
        n=draw(st.integers(1, 3)) if extended else 1,
        min_tokens=draw(st.sampled_from([0, 1])) if extended else 0,
        logprobs=draw(st.sampled_from([None, 0, 2])) if extended else None,
        tool_choice=None if raw else draw(st.sampled_from([None, None, "auto", "auto", "none", "required", *TOOLS])),
        parallel=draw(st.booleans()),
        schema=None if raw else draw(st.sampled_from([None, None, None, *SCHEMAS])),
    )


PIECES = st.one_of(st.sampled_from(FRAGMENTS), st.sampled_from(FRAGMENTS), st.text(max_size=5), st.integers(0, 599))
ANSWERS = st.lists(st.lists(PIECES, max_size=6), min_size=1, max_size=3)


@dataclass(frozen=True)
class Speaker:
    """Which of the answers a model gives is a function of the seed, the choice and the prompt.

    Where the answer has to match a grammar, the model says something that does.
    """

    tokenizer: ChatTokenizer
    obeying: ConstrainedModel
    answers: Sequence[Sequence[Piece]]
    obeyed: dict[GenerationRequest, Sequence[int]] = field(default_factory=dict)

    def __call__(self, request: GenerationRequest) -> Sequence[int]:
        if request.constraint:
            return self._obedient(request)
        key = repr((request.sampling.seed, request.choice, request.prompt_token_ids))
        ids: list[int] = []
        for piece in random.Random(key).choice(self.answers):
            ids += self._ids(piece)
        assert self.tokenizer.eos_token_id is not None
        return [*ids, self.tokenizer.eos_token_id]

    def _ids(self, piece: Piece) -> Sequence[int]:
        if isinstance(piece, int):
            return [piece % self.tokenizer.vocab_size]
        return self.tokenizer.encode_text(piece, add_bos=False, parse_special=False)

    def _obedient(self, request: GenerationRequest) -> Sequence[int]:
        begun = GenerationRequest(
            "",
            request.fingerprint,
            request.prompt_token_ids,
            request.sampling,
            request.max_new_tokens,
            request.stop_token_ids,
            choice=request.choice,
            constraint=request.constraint,
        )
        if (known := self.obeyed.get(begun)) is not None:
            return known
        matcher, ids = self.obeying.matcher(begun), list[int]()
        assert matcher is not None
        while not ids or begun.finish_reason(len(ids), ids[-1]) is None:
            if ids:
                matcher.consume_token(ids[-1])
            ids.append(self.obeying.token(begun, matcher, len(ids)))
        self.obeyed[begun] = ids
        return ids


class Model(NamedTuple):
    """A model's text side."""

    tokenizer: ChatTokenizer
    obeying: ConstrainedModel


class House:
    """Two ingresses in front of one model, with one store for streams and one for responses."""

    def __init__(self, model: Model, replica: SeededReplica) -> None:
        self.model = model
        self.replica = replica
        self.store, self.kept = (MemoryJournalStore(JournalLimits(lease_s=60)) for _ in range(2))
        self.here: dict[bool, Any] = {}
        """By whether it is over gRPC."""
        self.there: dict[bool, Any] = {}

    async def forget_half(self, stream_id: str, chance: random.Random) -> None:
        """The ingress that generates this stream died some time ago, and the journal has what it had written then."""
        journals = {**self.store.journals._journals, **self.kept.journals._journals}
        journal = journals[stream_id]
        async with asyncio.timeout(60):
            while not journal.finished:  # noqa: ASYNC110 - the store has no event for it
                await asyncio.sleep(0.001)
        replies = [numbered for record in journal.records for numbered in decode_replies(record)]
        kept = replies[: chance.randint(0, len(replies))]
        if kept and isinstance(last := kept[-1][1], TokenBatch) and last.token_ids:
            size = chance.randint(1, len(last.token_ids))
            logprobs = None if last.logprobs is None else last.logprobs[:size]
            finish = last.finish_reason if size == len(last.token_ids) else None
            kept[-1] = (kept[-1][0], TokenBatch(last.first_index, last.token_ids[:size], logprobs, finish, last.stats))
        journal.records, journal.finished = [encode_replies([each]) for each in kept], False


Houses = Callable[[str], Awaitable[House]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    made = {}
    for name, template in TEMPLATES.items():
        folder: Path = tmp_path_factory.mktemp("model")
        fast = PreTrainedTokenizerFast(
            tokenizer_object=byte_level_backend(), eos_token="<|im_end|>", unk_token="<|endoftext|>"
        )
        fast.chat_template = template
        fast.save_pretrained(folder)
        made[name] = Model(ChatTokenizer.load(folder), ConstrainedModel(load_vocabulary(folder)))
    return made


@pytest.fixture
async def house_of(models: dict[str, Model], make_app: Callable[..., Starlette]) -> AsyncIterator[Houses]:
    """house_of(a name of TEMPLATES); each is made once."""
    houses: dict[str, House] = {}
    async with AsyncExitStack() as open_ones:

        async def make(name: str) -> House:
            if name in houses:
                return houses[name]
            tokenizer, obeying = models[name]
            state = card(vocab_size=tokenizer.vocab_size, context_tokens=4096, kv_capacity_tokens=2**16)
            replica = SeededReplica(state, Speaker(tokenizer, obeying, [[]]))
            house = House(models[name], replica)
            failover = FailoverSettings(silence_s=60, max_attempts=10, first_backoff_s=0.0001, max_backoff_s=0.001)
            for callers in (house.here, house.there):
                app = make_app(replica, text=tokenizer, journals=house.store, kept=house.kept, failover=failover)
                target = await open_ones.enter_async_context(grpc_server(Servicer(app, replica.model)))
                channel = await open_ones.enter_async_context(grpc.aio.insecure_channel(target))
                callers |= {False: HttpCaller(app), True: GrpcCaller(channel)}
            houses[name] = house
            return house

        yield make


async def answers(
    house: House, protocol: Protocol, question: Question, chance: random.Random
) -> AsyncIterator[tuple[str, Facts]]:
    """(how the answer came, what it says), in every way in which this protocol answers."""
    here, there = (side[isinstance(protocol, Grpc)] for side in (house.here, house.there))
    replica = house.replica

    def read(events: Sequence[Event]) -> Facts:
        return protocol.of_events(events, question)

    for how, deaths in (("", 0), (", failed over", 3)):
        if protocol.has_whole:
            replica.forget(deaths=deaths)
            yield f"whole{how}", protocol.of_document(await here.whole(protocol, question), question)
        replica.forget(deaths=deaths)
        yield f"streamed{how}", read(await here.events(protocol, question))

    replica.forget(deaths=2)
    events = await here.events(protocol, question, resumable=True)
    yield "resumable, failed over", read(events)
    for side in (here, there):
        seen = events[: chance.randint(1, len(events))]
        assert await side.rest(protocol, question, seen) == events[len(seen) :]
    if path := protocol.document_path(events):
        yield "read again", protocol.of_document(await there.document(path), question)

    replica.forget(deaths=1)
    seen = await here.beginning(protocol, question, chance.randint(1, len(events)))
    yield "continued elsewhere", read(seen + await there.rest(protocol, question, seen))

    replica.forget()
    events = await here.events(protocol, question, resumable=True)
    await house.forget_half(protocol.stream_id(events), chance)
    replica.forget(deaths=1)
    seen = events[: chance.randint(1, len(events))]
    rest = await there.rest(protocol, question, seen)
    assert rest == events[len(seen) :]
    yield "taken over", read(seen + rest)


def asked(replica: SeededReplica) -> Facts:
    """What the replica was asked for each choice since it last forgot, whatever the attempts were."""
    return {
        f"asked for choice {each.choice}": (
            each.prompt_token_ids,
            each.sampling,
            each.max_new_tokens,
            each.stop_token_ids,
            each.constraint,
            each.cache_salt,
        )
        for each in replica.requests
    }


async def differences(house: House, question: Question, chance: random.Random) -> AsyncIterator[str]:
    """What two answers to one question say differently."""
    known: dict[str, tuple[Any, str]] = {}
    for protocol in PROTOCOLS:
        if not protocol.can_ask(question):
            continue
        async for how, facts in answers(house, protocol, question, chance):
            for name, value in (facts | asked(house.replica)).items():
                first, whose = known.setdefault(name, (value, f"{protocol}, {how}"))
                if value != first:
                    yield f"{name}: {first!r} ({whose}), but {value!r} ({protocol}, {how})"
    if known["cached tokens"][0] != FIRST_CACHED:
        yield "cached tokens are not those of the attempt that began the answer"


@settings(
    max_examples=EXAMPLES,
    phases=[Phase.explicit, Phase.generate],  # to shrink one takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(model=st.sampled_from(sorted(TEMPLATES)), question=questions(), said=ANSWERS, seed=st.integers(0, 2**32))
async def test_a_question_has_one_answer(
    house_of: Houses, model: str, question: Question, said: Sequence[Sequence[Piece]], seed: int
) -> None:
    note(f"{model=}, {question}, {said=}, {seed=}")
    house = await house_of(model)
    house.replica.chance = random.Random(seed)
    house.replica.speaks = Speaker(*house.model, said)
    question = replace(question, plain=model == "calls" or bool(question.prompt))
    assert not [each async for each in differences(house, question, house.replica.chance)]
