"""Shared by all of serve_app: the messages between an ingress and a model server, and the error that answers a request.

Messages are immutable, hold ids and numbers and never text, and cross process boundaries. Imports nothing else of
serve_app.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

import msgspec
from msgspec import Struct

Fingerprint = NewType("Fingerprint", str)
"""Identity of a set of weights: source, revision, contents, dtype and quantisation. A stream never changes it."""


class FinishReason(StrEnum):
    """Why a generation ended; the values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    """The model stopped after it had called tools. Only an ingress can tell: it reads the text."""


class FailureCode(StrEnum):
    """Why a generation could not go on. `serve_app.api.errors` maps each to an HTTP status."""

    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    INVALID_REQUEST = "invalid_request"
    OVERLOADED = "overloaded"
    OVER_SHARE = "rate_limit_exceeded"
    """Its tenant has more than its share of the service while others wait. OpenAI's code for too many requests."""
    NOT_READY = "not_ready"
    WRONG_WEIGHTS = "wrong_weights"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    REPLICA_LOST = "replica_lost"
    POISON = "request_killed_replica"
    ENGINE_FAILED = "engine_failed"
    CANCELLED = "cancelled"
    """Its caller has ended it. Only an ingress says so."""


class Priority(StrEnum):
    """Classes of requests."""

    INTERACTIVE = "interactive"
    BATCH = "batch"
    """Uses what interactive requests leave, and yields to them."""


SAMPLING_BOUNDS: Mapping[str, tuple[float, float]] = {
    "seed": (0, 2**64 - 1),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-2, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "min_tokens": (0, math.inf),
}
"""Bounds of what a sampler can compute. Callers are held to narrower ones: OpenAI's, in `api.fields`."""


class SamplingParams(Struct, frozen=True):
    """How to choose each token. Every default is resolved and the seed drawn before this object is made.

    The draw for output position i is a pure function of (seed, choice, i) and the logits at i.
    """

    seed: int
    """64-bit unsigned."""
    temperature: float = 1.0
    """0 is greedy: the largest logit, the lowest id on a tie."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output, as in transformers: positive logits divided, negative ones multiplied."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Both over the output only, as OpenAI defines them."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    """Stop ids can't be chosen before this many output tokens; the ingress ignores stop strings until then."""
    logprobs: int | None = None
    """None: no logprobs. k >= 0: the chosen token's, and the k most likely ones."""

    def __post_init__(self) -> None:
        """Raises ValueError for values that no sampler could honour, so that none reaches the device."""
        for name, (low, high) in SAMPLING_BOUNDS.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be between {low:g} and {high:g}, not {getattr(self, name)}")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs must not be negative, not {self.logprobs}")
        if not all(math.isfinite(bias) for _, bias in self.logit_bias):
            raise ValueError("logit_bias must hold finite numbers")


class GenerationRequest(Struct, frozen=True):
    """One choice of one request: all that a replica needs to produce the rest of its output.

    An attempt that starts with k `output_token_ids` continues as the attempt that made them would have.
    """

    request_id: str
    fingerprint: Fingerprint
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_new_tokens: int
    """Limit of the whole output, `output_token_ids` included. 0: only the prompt's logprobs are wanted."""
    stop_token_ids: tuple[int, ...] = ()
    """Any of these ends the output (it is emitted, counted, and has no text). EOS is among them unless ignored."""
    output_token_ids: tuple[int, ...] = ()
    """Already delivered by an earlier attempt; empty on the first."""
    numerics_id: str = ""
    """Identifies the arithmetic of the replica that made `output_token_ids`, if it is batch-invariant. A replica with
    the same `numerics_id` continues the output bit for bit; another one with the same weights continues it only if
    there is no such replica. Empty: any replica with these weights may continue it."""
    choice: int = 0
    isolated: bool = False
    """Compute it in engine steps of its own until its first new token: it may have killed replicas, and must not take
    other requests with it."""
    ingress_id: str = ""
    """Name of the ingress process that waits for the reply: the replica stops when that process dies. Empty:
    unknown."""
    attempt: int = 0
    """Number of this attempt in the process `ingress_id`, from 1; 0: not numbered."""
    constraint: str = ""
    """A grammar that the output must match, in the form that `llguidance.LLMatcher` takes. Which ids may come next is a
    function of this text and of the output ids, so an attempt that continues an output needs nothing else. Empty: no
    constraint."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    tenant: str = ""
    """Whose request it is. Tenants take turns; "" is everybody where nobody has a key."""
    weight: float = 1.0
    """The tenant's share of the service, relative to those of other tenants that ask at the same time."""
    priority: Priority = Priority.INTERACTIVE
    remaining_s: float | None = None
    """Time left, recomputed at each hop (clocks of two machines are never compared). None: no limit."""
    prompt_logprobs: int | None = None
    """None: no logprobs of the prompt. k >= 0: each prompt token's, and the k most likely ones in its place. They come
    with the first tokens, so an attempt that continues an output does not compute them again."""

    predicted_token_ids: tuple[int, ...] = ()
    """What the caller expects of the output, or of parts of it. It changes when tokens come, and no token."""

    accepted: bool = False
    """The caller was told that the request is accepted: it comes before new ones, and is not refused for waiting."""

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether this attempt has to compute the prompt's logprobs."""
        return self.prompt_logprobs is not None and not self.output_token_ids

    def finish_reason(self, output_tokens: int, last_token_id: int | None) -> FinishReason | None:
        """Why an output of `output_tokens` tokens ends with `last_token_id`; None if it goes on."""
        if last_token_id in self.stop_token_ids and output_tokens > self.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if output_tokens >= self.max_new_tokens else None


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural-log probabilities under the model's own distribution, before penalties, bias and temperature."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), most likely first."""


class PromptLogprobs(Struct, frozen=True, array_like=True):
    """What a model says about the n tokens of a prompt that follow the first one, each given the tokens before it.

    Natural-log probabilities under the model's own distribution, as float32, and ids as uint32, packed in the machine's
    byte order (little-endian on every machine this runs on): 8,000 tokens with the 5 most likely take 0.4 MB, and
    nothing is done for each of them until an ingress writes them.
    """

    top: int
    """How many of the most likely tokens are listed for each place."""
    logprobs: bytes
    """`[n]`: those of the prompt's own tokens."""
    ranks: bytes
    """`[n]` of uint32: 1 and the number of tokens that are more likely in this place."""
    top_ids: bytes
    """`[n, top]`, most likely first."""
    top_logprobs: bytes
    """`[n, top]`"""

    def __len__(self) -> int:
        return len(self.logprobs) // 4

    def tokens(self) -> Iterator[tuple[TokenLogprobs, int]]:
        """For each token: its logprobs, and its rank."""
        logprobs, ranks = memoryview(self.logprobs).cast("f"), memoryview(self.ranks).cast("I")
        ids, likely = memoryview(self.top_ids).cast("I"), memoryview(self.top_logprobs).cast("f")
        for place, (logprob, rank) in enumerate(zip(logprobs, ranks, strict=True)):
            listed = slice(place * self.top, (place + 1) * self.top)
            yield TokenLogprobs(logprob, tuple(zip(ids[listed], likely[listed], strict=True))), rank


class GenerationStats(Struct, frozen=True, array_like=True):
    """The engine's counters for one attempt, sent with its first tokens and with its last batch.

    They come with the first tokens too, because an answer that a stop string ends has no last batch: the engine does
    not know stop strings.
    """

    cached_prompt_tokens: int = 0
    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    preemptions: int = 0
    numerics_id: str = ""
    """Identifies the replica's arithmetic, if it is batch-invariant; see `GenerationRequest`."""


class TokenBatch(Struct, frozen=True, array_like=True, tag=0):
    """Consecutive output tokens. An empty one means "alive": it comes each second while nothing else does."""

    first_index: int
    """Position of the first token of this batch in the output (0 is the first token after the prompt)."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One per token, if the request asked for logprobs."""
    finish_reason: FinishReason | None = None
    stats: GenerationStats | None = None
    prompt_logprobs: PromptLogprobs | None = None
    """With the first tokens, if the request asked for them."""


class Failure(Struct, frozen=True, array_like=True, tag=1):
    """An error as the last reply of a stream. It is no exception, since exception types differ by transport."""

    code: FailureCode
    message: str
    """One sentence for the caller: what is wrong and what to do. No traceback, no path."""
    retry_after_s: float | None = None


Reply = TokenBatch | Failure


class ReplicaLoad(Struct, frozen=True, array_like=True, tag=2):
    """What a replica has to do at the moment.

    It tells each ingress when a number of requests changes, or another number by an eighth (`engine.load.is_news`).
    It does so once a step at most.
    """

    running: int
    """Requests that are computed."""
    waiting: int
    """Requests that wait in the replica for a place or for KV cache, preempted ones included."""
    places: int
    """Requests that may run at once (`engine.max_running`)."""
    free_tokens: int
    """Tokens of KV cache that no request holds."""
    waiting_tokens: int
    """Tokens of prompts that are not computed yet, of running and waiting requests."""
    tokens_per_s: float
    """Output tokens of all requests together, over the last seconds in which there was work. 0: not known yet."""
    seconds_per_request: float
    """How long the requests that ended lately took from their place in a step to their end. 0: not known yet."""


class MessageError(Exception):
    """These bytes are not what another process of this version would have written."""


_ENCODER = msgspec.msgpack.Encoder()
_REPLIES = msgspec.msgpack.Decoder(list[tuple[int, Reply]])
_NEWS = msgspec.msgpack.Decoder(list[tuple[int, Reply | ReplicaLoad]])


def encode_replies(replies: Sequence[tuple[int, Reply | ReplicaLoad]]) -> bytes:
    """Numbered replies as one message, or as one journal record; takes 2 us for 32 one-token batches (AVX2)."""
    return _ENCODER.encode(replies)


def decode_replies(content: bytes | memoryview) -> list[tuple[int, Reply]]:
    """The replies that `encode_replies` was given, floats bit for bit. Raises `MessageError`."""
    try:
        return _REPLIES.decode(content)
    except (msgspec.MsgspecError, ValueError) as error:
        raise MessageError("these bytes are no replies") from error


def decode_news(content: bytes | memoryview) -> list[tuple[int, Reply | ReplicaLoad]]:
    """As `decode_replies`, where a replica's load may be among the replies. Raises `MessageError`."""
    try:
        return _NEWS.decode(content)
    except (msgspec.MsgspecError, ValueError) as error:
        raise MessageError("these bytes are no news of a replica") from error


class RequestError(Exception):
    """One request can't be answered, or not to its end. Any module may raise it; `api` makes an HTTP error of it."""

    def __init__(
        self, message: str, *, code: str | None, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        """`message`: what is wrong and what to do. `code`: for programs. `param`: the field, as `messages[0].role`."""
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, failure: Failure) -> RequestError:
        """The error of a generation that failed."""
        return cls(failure.message, code=failure.code, retry_after_s=failure.retry_after_s)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling parameters for requests that don't give them (here OpenAI's), and the ids that end an answer."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    """Sorted; empty if the model defines none."""


class ModelCard(Struct, frozen=True):
    """What a ready replica says of itself."""

    name: str
    fingerprint: Fingerprint
    context_tokens: int
    """Prompt plus output of one request can't be longer."""
    kv_capacity_tokens: int
    """Tokens of KV cache the replica holds, over all requests."""
    vocab_size: int
    weights_bytes: int
    kv_cache_bytes: int
    device: str
    dtype: str
    attention_backend: str
    batch_invariant: bool = False
    """Checked at load: a request's tokens are the same bits alone, in a batch, in chunks and continued (P3)."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: fallbacks that were taken, checks that failed."""


class LoadStage(Struct, frozen=True):
    """How far a replica is with loading: shown while nothing can be served yet."""

    stage: str
    """For people: "fetching weights", "loading weights", "checking attention"."""
    fraction: float | None = None
    """0 to 1 within the stage, None when unknown."""
    error: str | None = None
    """One sentence, when loading failed for good."""


_LOADING_RETRY_AFTER_S = 5.0


def not_ready(stage: LoadStage) -> RequestError:
    """The error while no model can answer: a temporary one while it loads, a final one if loading failed."""
    if stage.error is not None:
        return RequestError(f"The model could not be loaded: {stage.error}", code=FailureCode.NOT_READY)
    message = f"The model is not ready yet ({stage.stage}); GET /ready says how far it is."
    return RequestError(message, code=FailureCode.NOT_READY, retry_after_s=_LOADING_RETRY_AFTER_S)
