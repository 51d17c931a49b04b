"""From what a caller asked to a stream of text: defaults, seed, context, generations, counts.

Promises the same text whether it is streamed or not, and that leaving a `Completion` frees the device at once (P5).
Knows no HTTP and no wire format; errors are raised as the `ApiError` that the wire formats show.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from types import TracebackType

from serve_app.api.errors import bad_request, from_failure, from_prompt, model_not_found, not_ready
from serve_app.api.fields import ANY_SEED, CompletionParams
from serve_app.chat.conversation import Unknown, refuse_unknown
from serve_app.chat.detokenizer import Detokenizer
from serve_app.chat.errors import PromptError, context_exceeded
from serve_app.chat.options import DEFAULT_OPTIONS, ChatOptions
from serve_app.chat.prompts import PromptFormatter
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import Failure, Fingerprint, GenerationRequest, LoadStage, ModelCard, SamplingParams
from serve_app.generation.attempts import FailoverSettings, Generation, interleave
from serve_app.generation.replica import ReplicaClient
from serve_app.generation.text import ChoiceText, Delta
from serve_app.observability.logs import RequestRecord

MAX_CHOICES = 32
"""Over all prompts of one request: it counts once in `max_streams`."""
SEED_BITS = 53
"""Of a seed drawn here: as many as a JavaScript client can read and send back. Callers may use 64."""
GREEDY_BELOW = 1e-4
"""A temperature this close to 0 is 0: the quotient leaves float32, and no draw would differ from greedy."""


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """What the model says about sampling where a caller says nothing; the values here are OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as ids."""

    ids: tuple[int, ...]
    continues: bool
    """The answer continues the prompt's text (a raw prompt, an open message), instead of standing alone (a chat)."""
    param: str
    """The field it came in."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost, in tokens."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    def document(self) -> dict[str, object]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """A request resolved and checked: all that is needed to answer it, by this process or by another."""

    model: str
    """Its name, for clients."""
    requests: tuple[GenerationRequest, ...]
    """One for each choice: number `p * choices_per_prompt + c` is the c-th of prompt p."""
    continues: bool
    """As in `Prompt`."""
    stops: tuple[str, ...]
    choices_per_prompt: int

    @property
    def choices(self) -> int:
        """Of all prompts."""
        return len(self.requests)

    @property
    def seed(self) -> int:
        """The one that was asked for or drawn."""
        return self.requests[0].sampling.seed

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the weights that answer."""
        return self.requests[0].fingerprint

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Ids that end an answer, and have no text."""
        return frozenset(self.requests[0].stop_token_ids)

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once, however many choices it has."""
        return sum(len(request.prompt_token_ids) for request in self.requests[:: self.choices_per_prompt])


class CompletionService:
    """Answers for one model. One per ingress replica, used from its event loop."""

    def __init__(
        self,
        client: ReplicaClient,
        formatter: PromptFormatter,
        defaults: ModelDefaults,
        failover: FailoverSettings | None = None,
        aliases: frozenset[str] = frozenset(),
    ) -> None:
        """`aliases`: other names that the model answers to."""
        self._aliases = aliases
        self.tokenizer: ChatTokenizer = formatter.tokenizer
        self._client = client
        self._formatter = formatter
        self._defaults = defaults
        self._failover = failover or FailoverSettings()

    async def state(self) -> ModelCard | LoadStage:
        """The card of the model when it can serve, or how far it is."""
        return await self._client.model()

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """The sampling parameters of requests that don't give them."""
        return {name: value for name, value in asdict(self._defaults).items() if name != "eos_token_ids"}

    async def ready_model(self, name: str | None = None) -> ModelCard:
        """The card. Raises `ApiError`: 503 while there is no model to serve, 404 when it has another `name`.

        No name, or an empty one, is the model's.
        """
        state = await self._client.model()
        if isinstance(state, LoadStage):
            raise not_ready(state)
        if name and name != state.name and name not in self._aliases:
            raise model_not_found(name)
        return state

    @property
    def template_variables(self) -> frozenset[str]:
        """Variables of the model's chat template that a caller may set."""
        return self._formatter.template_variables

    def render_chat(
        self,
        card: ModelCard,
        messages: Sequence[Mapping[str, object]],
        options: ChatOptions = DEFAULT_OPTIONS,
        unknown: Unknown = refuse_unknown,
    ) -> Prompt:
        """The prompt of a chat. `unknown` is as in `parse_messages`. Safe on any thread. Raises `ApiError`."""
        try:
            ids = self._formatter.render_chat(messages, options, context_tokens=card.context_tokens, unknown=unknown)
        except PromptError as error:
            raise from_prompt(error) from None
        return Prompt(tuple(ids), options.continue_final_message, "messages")

    def render_text(self, card: ModelCard, text: str, *, parse_special: bool = False) -> Prompt:
        """The prompt of a text that is to be continued. Safe on any thread. Raises `ApiError`."""
        limit = card.context_tokens
        try:
            ids = self._formatter.render_text(text, parse_special=parse_special, context_tokens=limit)
        except PromptError as error:
            raise from_prompt(error) from None
        return Prompt(tuple(ids), True, "prompt")

    def plan(
        self,
        card: ModelCard,
        prompts: Sequence[Prompt],
        params: CompletionParams,
        record: RequestRecord,
        remaining_s: float,
    ) -> Plan:
        """Everything about a request resolved and checked. Raises `ApiError`."""
        if len(prompts) * params.n > MAX_CHOICES:
            raise bad_request(f"One request can have at most {MAX_CHOICES} choices over all its prompts.", param="n")
        sampling = self._sampling(card, params)
        # A tokenizer may know more ids than the model has; the engine would refuse them.
        eos = (token_id for token_id in self._defaults.eos_token_ids if token_id < card.vocab_size)
        stop_token_ids = tuple(sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos)}))
        self._check_ids(card, params.stop_token_ids, "stop_token_ids")
        requests: list[GenerationRequest] = []
        for prompt in prompts:
            self._check_ids(card, prompt.ids, prompt.param)
            max_new_tokens = _max_new_tokens(_room(card, prompt), params, record)
            if sampling.min_tokens > max_new_tokens:
                raise bad_request(f"min_tokens is larger than the {max_new_tokens} that can come.", param="min_tokens")
            for _ in range(params.n):
                request = GenerationRequest(
                    request_id=record.request_id,
                    fingerprint=card.fingerprint,
                    prompt_token_ids=prompt.ids,
                    sampling=sampling,
                    max_new_tokens=max_new_tokens,
                    stop_token_ids=stop_token_ids,
                    choice=len(requests),
                    cache_salt=params.sampling.cache_salt or "",
                    remaining_s=remaining_s,
                )
                requests.append(request)
        plan = Plan(card.name, tuple(requests), prompts[0].continues, params.sampling.stop, params.n)
        record.prompt_tokens = plan.prompt_tokens
        return plan

    def start(self, plan: Plan, record: RequestRecord) -> Completion:
        """The answer; entering it starts the work. Raises `ApiError`."""
        return Completion(plan, self._client, self._failover, choice_texts(plan, self.tokenizer), record)

    def _sampling(self, card: ModelCard, params: CompletionParams) -> SamplingParams:
        asked, model = params.sampling, self._defaults
        self._check_ids(card, [token_id for token_id, _ in params.logit_bias], "logit_bias")
        temperature = model.temperature if asked.temperature is None else asked.temperature
        top_p = model.top_p if asked.top_p is None else asked.top_p
        greedy = temperature < GREEDY_BELOW or top_p == 0
        return SamplingParams(
            seed=secrets.randbits(SEED_BITS) if asked.seed in (None, ANY_SEED) else asked.seed % 2**64,
            temperature=0.0 if greedy else temperature,
            top_p=top_p or 1.0,
            top_k=model.top_k if asked.top_k is None else max(0, asked.top_k),
            min_p=model.min_p if asked.min_p is None else asked.min_p,
            repetition_penalty=(
                model.repetition_penalty if asked.repetition_penalty is None else asked.repetition_penalty
            ),
            presence_penalty=asked.presence_penalty or 0.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            logit_bias=params.logit_bias,
            min_tokens=params.min_tokens,
            logprobs=params.logprobs,
        )

    @staticmethod
    def _check_ids(card: ModelCard, ids: Sequence[int], param: str) -> None:
        if ids and max(ids) >= card.vocab_size:
            raise bad_request(f"A token id must be below the vocabulary's size of {card.vocab_size}.", param=param)


class Completion:
    """One request under way: one or more choices. An async context manager; leaving it cancels what still runs."""

    def __init__(
        self,
        plan: Plan,
        client: ReplicaClient,
        failover: FailoverSettings,
        texts: Sequence[ChoiceText],
        record: RequestRecord,
    ) -> None:
        self._choices_per_prompt = plan.choices_per_prompt
        self._texts = texts
        self._record = record
        self._changed = asyncio.Event()
        self._generations = [Generation(client, request, self._changed, failover) for request in plan.requests]

    async def __aenter__(self) -> Completion:
        for generation in self._generations:
            await generation.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.gather(*(generation.aclose() for generation in self._generations))

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What each choice gains, as it comes; every choice ends with a finish reason.

        Raises `ApiError` when a choice can't go on; what came before stays valid.
        """
        record = self._record
        async with aclosing(interleave(self._generations, self._changed)) as replies:
            async for choice, reply in replies:
                if isinstance(reply, Failure):
                    raise from_failure(reply)
                delta = self._texts[choice].push(reply)
                if delta.token_ids:
                    record.saw_tokens(len(delta.token_ids))
                if reply.stats is not None and choice % self._choices_per_prompt == 0:
                    record.cached_prompt_tokens += reply.stats.cached_prompt_tokens
                if delta.finish_reason is not None:
                    record.outcome = delta.finish_reason
                    if reply.finish_reason is None:  # a stop string: the model would go on
                        await self._generations[choice].aclose()
                yield delta

    @property
    def usage(self) -> Usage:
        """What was counted so far. Each prompt counts once, however many choices it has, with its first one's cache
        hits."""
        record = self._record
        return Usage(record.prompt_tokens, record.cached_prompt_tokens, sum(text.tokens for text in self._texts))


def choice_texts(plan: Plan, tokenizer: ChatTokenizer) -> list[ChoiceText]:
    """The text of each choice, before its first token. Raises `ApiError`."""
    try:
        return [
            ChoiceText(
                request.choice,
                Detokenizer(tokenizer, request.prompt_token_ids if plan.continues else ()),
                plan.stops,
                plan.stop_token_ids,
                request.sampling.min_tokens,
            )
            for request in plan.requests
        ]
    except PromptError as error:
        raise from_prompt(error) from None


def _room(card: ModelCard, prompt: Prompt) -> int:
    """Tokens that the context leaves for the answer, at least one. Raises `ApiError`."""
    limit = min(card.context_tokens, card.kv_capacity_tokens)
    if len(prompt.ids) >= limit:
        raise from_prompt(context_exceeded(limit, len(prompt.ids), prompt.param))
    return limit - len(prompt.ids)


def _max_new_tokens(room: int, params: CompletionParams, record: RequestRecord) -> int:
    """Tokens that the answer may have; `record` is told when they are fewer than the caller's own limit."""
    if params.max_tokens is None:
        return room if params.default_max_tokens is None else min(room, params.default_max_tokens)
    if params.max_tokens > room:
        name = params.max_tokens_param
        record.clamped_fields[name] = min(room, record.clamped_fields.get(name, room))
    return min(room, params.max_tokens)
