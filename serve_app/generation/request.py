"""A request with everything resolved: defaults, seed, limits and the prompts as ids.

Promises that what is resolved can be answered by any ingress process, with the same tokens. Knows no wire format.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from msgspec import Struct

from serve_app.chat.answers import AnswerFormat
from serve_app.chat.prompt_error import context_exceeded
from serve_app.core import (
    Fingerprint,
    GenerationDefaults,
    GenerationRequest,
    ModelCard,
    Priority,
    RequestError,
    SamplingParams,
)

MAX_CHOICES = 128
"""Over all prompts of one request: evaluation harnesses send as many prompts at once. Half of what a replica's engine
takes by default (32 running, 256 waiting). A request counts as one stream in `max_streams`, whatever its choices."""
MAX_PROMPT_LOGPROBS = 500_000
"""Logprobs of prompts that one request may ask for, the most likely tokens included: 4 MB between replica and ingress,
and 18 MB of JSON, which takes 3 s in a thread of its own (AVX2)."""
MAX_STREAMED_PROMPT_LOGPROBS = 10_000
"""The same for a stream. These events come all at once, 0.4 MB; those of a resumable stream are written in the event
loop, in about 60 ms."""
SEED_BITS = 53
"""Bits of a seed drawn here: as many as a JavaScript client can read and send back. Callers may use 64."""
ANY_SEED = -1
"""A caller's `seed` that means the same as none: a seed is drawn."""
GREEDY_BELOW = 1e-4
"""A lower temperature counts as 0: dividing logits by it may overflow float32, and no draw would differ from greedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionParams:
    """What a caller asked for, whatever the wire format. None: what the model says, else OpenAI's default."""

    temperature: float | None = None
    top_p: float | None = None
    """0 is greedy: the likeliest token alone."""
    top_k: int | None = None
    """0 and -1 are off."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    """-1 means none. Any other negative seed is the same as the unsigned number with its 64 bits."""
    stop: tuple[str, ...] = ()
    cache_salt: str = ""
    priority: Priority = Priority.INTERACTIVE
    max_tokens: int | None = None
    """The caller's own limit, cut to what fits the context (`ResolvedRequest.cut_to` says so). None: no limit."""
    default_max_tokens: int | None = None
    """The wire format's limit when the caller has none: cut to what fits. None: all that is left of the context."""
    n: int = 1
    """Choices for each prompt."""
    logprobs: int | None = None
    """See `SamplingParams`."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    """See `GenerationRequest`."""
    echo: bool = False
    """The prompt is shown before each answer."""
    truncate_to: int | None = None
    """Longest prompt; a longer one is cut to it. -1: what the context holds beside the answer."""
    keep_first: bool = False
    """A prompt is cut at its end, not at its beginning."""
    streamed: bool = False
    predicted_token_ids: tuple[int, ...] = ()
    """See `GenerationRequest`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as ids."""

    ids: tuple[int, ...]
    continues: bool
    """The answer continues the prompt's text (a raw prompt, an open message), instead of standing alone (a chat)."""
    param: str
    """The request's field that held the prompt."""
    answer: AnswerFormat | None = None
    """How the answer's text is read; None: it is text and nothing else."""
    constraint: str = ""
    """What the answer must match; see `GenerationRequest`."""
    end_token_ids: tuple[int, ...] = ()
    """Ids that end the answer, besides the model's own."""


class ResolvedRequest(Struct, frozen=True):
    """All that is needed to answer a request, by this process or by another."""

    model: str
    """The model's name, for clients."""
    requests: tuple[GenerationRequest, ...]
    """One for each choice: number `p * choices_per_prompt + c` is the c-th choice of prompt p."""
    continues: bool
    """See `Prompt`."""
    stops: tuple[str, ...]
    choices_per_prompt: int
    cut_to: int | None = None
    """What the caller's own limit was cut to, to fit the context; None when it was not."""
    answer: AnswerFormat | None = None
    """See `Prompt`."""
    echo: bool = False
    """The prompt is shown before each answer. Then logprobs are those of all tokens that are counted, also of the one
    that ended the answer: as many as prompt and answer have tokens."""
    asked_tokens: int | None = None
    """The caller's own limit of each answer. None: it gave none."""

    @property
    def request_id(self) -> str:
        """The id of the caller's request, used in every log."""
        return self.requests[0].request_id

    @property
    def choices(self) -> int:
        """Number of choices, over all prompts."""
        return len(self.requests)

    @property
    def seed(self) -> int:
        """The seed that was asked for or drawn."""
        return self.requests[0].sampling.seed

    @property
    def priority(self) -> Priority:
        """The class of the request."""
        return self.requests[0].priority

    @property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the weights that answer."""
        return self.requests[0].fingerprint

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Ids that end an answer, and have no text."""
        return frozenset(self.requests[0].stop_token_ids)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts. Each prompt counts once, however many choices it has."""
        return sum(len(request.prompt_token_ids) for request in self.requests[:: self.choices_per_prompt])

    @property
    def prompt_logprobs(self) -> int:
        """Number of the prompts' logprobs that are computed, those of the most likely tokens included."""
        return sum(
            len(request.prompt_token_ids) * (1 + request.prompt_logprobs)
            for request in self.requests
            if request.prompt_logprobs is not None
        )


def resolve(
    defaults: GenerationDefaults,
    card: ModelCard,
    prompts: Sequence[Prompt],
    params: CompletionParams,
    *,
    request_id: str,
    remaining_s: float,
) -> ResolvedRequest:
    """Resolve and check everything about a request. Raises `RequestError`."""
    if len(prompts) * params.n > MAX_CHOICES:
        raise _invalid(f"One request can have at most {MAX_CHOICES} choices over all its prompts.", "n")
    _check_ids(card, [token_id for token_id, _ in params.logit_bias], "logit_bias")
    _check_ids(card, params.stop_token_ids, "stop_token_ids")
    _check_ids(card, params.predicted_token_ids, "prediction")
    sampling = _sampling(params, defaults)
    # A tokenizer may know more ids than the model has; the engine would refuse them.
    eos = () if params.ignore_eos else (*defaults.eos_token_ids, *prompts[0].end_token_ids)
    eos = tuple(token_id for token_id in eos if token_id < card.vocab_size)
    stop_token_ids = tuple(sorted({*params.stop_token_ids, *eos}))
    limit = params.default_max_tokens if params.max_tokens is None else params.max_tokens
    requests: list[GenerationRequest] = []
    cut_to: int | None = None
    for prompt in _truncated(card, prompts, params, limit):
        _check_ids(card, prompt.ids, prompt.param)
        room = _room(card, prompt, least=0 if limit == 0 else 1)
        max_new_tokens = room if limit is None else min(room, limit)
        if params.max_tokens is not None and max_new_tokens < params.max_tokens:
            cut_to = max_new_tokens if cut_to is None else min(cut_to, max_new_tokens)
        if sampling.min_tokens > max_new_tokens:
            raise _invalid(f"min_tokens is larger than the {max_new_tokens} that can come.", "min_tokens")
        for number in range(params.n):
            request = GenerationRequest(
                request_id=request_id,
                fingerprint=card.fingerprint,
                prompt_token_ids=prompt.ids,
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                stop_token_ids=stop_token_ids,
                choice=len(requests),
                constraint=prompt.constraint,
                cache_salt=params.cache_salt,
                priority=params.priority,
                remaining_s=remaining_s,
                predicted_token_ids=params.predicted_token_ids,
                # Where each choice shows the prompt, each gives its logprobs; else the first one of the prompt does.
                prompt_logprobs=params.prompt_logprobs if params.echo or number == 0 else None,
            )
            requests.append(request)
    first = prompts[0]
    resolved = ResolvedRequest(
        card.name,
        tuple(requests),
        first.continues,
        params.stop,
        params.n,
        cut_to,
        first.answer,
        params.echo,
        params.max_tokens,
    )
    _check_prompt_logprobs(resolved, params)
    return resolved


def _truncated(
    card: ModelCard, prompts: Sequence[Prompt], params: CompletionParams, limit: int | None
) -> Sequence[Prompt]:
    """The prompts, cut as the caller asked; `limit`: of the answer."""
    if params.truncate_to is None:
        return prompts
    longest = params.truncate_to
    if longest < 0:
        longest = min(card.context_tokens, card.kv_capacity_tokens) - (1 if limit is None else limit)
        if longest < 1:
            message = f"max_tokens of {limit} leaves no room for a prompt, so it can't be cut to what is left."
            raise _invalid(message, "truncate_prompt_tokens")
    return [replace(each, ids=each.ids[:longest] if params.keep_first else each.ids[-longest:]) for each in prompts]


def _check_prompt_logprobs(request: ResolvedRequest, params: CompletionParams) -> None:
    """Raise `RequestError` if the request asks for more of its prompts' logprobs than an answer may hold."""
    most = MAX_STREAMED_PROMPT_LOGPROBS if params.streamed else MAX_PROMPT_LOGPROBS
    if request.prompt_logprobs > most:
        what = "stream" if params.streamed else "request"
        message = (
            f"A {what} can have at most {most} logprobs of prompts, those of the most likely tokens included; this one "
            f"asks for {request.prompt_logprobs}. Ask for fewer of the most likely tokens, or send fewer tokens"
        )
        raise _invalid(f"{message}, or do not stream." if params.streamed else f"{message} at once.", "logprobs")


def _sampling(asked: CompletionParams, model: GenerationDefaults) -> SamplingParams:
    temperature = model.temperature if asked.temperature is None else asked.temperature
    top_p = model.top_p if asked.top_p is None else asked.top_p
    greedy = temperature < GREEDY_BELOW or top_p == 0
    return SamplingParams(
        seed=secrets.randbits(SEED_BITS) if asked.seed in (None, ANY_SEED) else asked.seed % 2**64,
        temperature=0.0 if greedy else temperature,
        top_p=top_p or 1.0,
        top_k=model.top_k if asked.top_k is None else max(0, asked.top_k),
        min_p=model.min_p if asked.min_p is None else asked.min_p,
        repetition_penalty=model.repetition_penalty if asked.repetition_penalty is None else asked.repetition_penalty,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=asked.logit_bias,
        min_tokens=asked.min_tokens,
        logprobs=asked.logprobs,
    )


def _check_ids(card: ModelCard, ids: Sequence[int], param: str) -> None:
    if ids and max(ids) >= card.vocab_size:
        raise _invalid(f"A token id must be below the vocabulary's size of {card.vocab_size}.", param)


def _room(card: ModelCard, prompt: Prompt, *, least: int = 1) -> int:
    """Tokens that the context leaves for the answer, at least `least`. Raises `PromptError`."""
    limit = min(card.context_tokens, card.kv_capacity_tokens)
    if len(prompt.ids) + least > limit:
        raise context_exceeded(limit, len(prompt.ids), prompt.param)
    return limit - len(prompt.ids)


def _invalid(message: str, param: str) -> RequestError:
    return RequestError(message, code="invalid_value", param=param)
