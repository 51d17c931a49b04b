"""The request fields that every wire format shares, and what the service makes of them.

Promises that what passes is finite, in range and of the right type, and that no unknown field passes in silence. Knows
no endpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from serve_app.api.described import BlockMessage, Message
from serve_app.api.errors import bad_request, from_validation, unknown_parameter
from serve_app.api.priority import FLEX, RequestPriority
from serve_app.api.unknown_fields import NO_EFFECT, NOT_SERVED, UnknownFields, refuse_if_not_served
from serve_app.core import Priority
from serve_app.generation.request import CompletionParams

NO_LIMIT = -1
"""As `max_tokens`: all that is left of the context. Other servers give -1 the same meaning."""
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_CHOICES_PER_PROMPT = 8
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1024
MAX_CACHE_SALT_CHARS = 256
MAX_PROMPT_LOGPROBS = 20
"""Of the most likely tokens for each token of the prompt. vLLM's default limit."""


def _stops(value: Any) -> Any:
    """None, a string or a list of strings -> a tuple of strings, without the empty ones, which stop nothing."""
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "A string or a list of strings is expected.")
    stops = [stop for stop in stops if stop]
    if len(stops) > MAX_STOPS or not all(len(stop) <= MAX_STOP_CHARS for stop in stops):
        message = f"At most {MAX_STOPS} stop strings of 1 to {MAX_STOP_CHARS} characters each are taken."
        raise PydanticCustomError("stop_value", "{expected}", {"expected": message})
    return tuple(stops)


def _logit_bias(value: Any) -> Any:
    """None or {"token id": bias} -> a tuple of pairs."""
    if value is None:
        return ()
    if not isinstance(value, dict) or not all(isinstance(bias, int | float) for bias in value.values()):
        raise PydanticCustomError("logit_bias_type", "An object of token ids and numbers is expected.")
    if len(value) > MAX_LOGIT_BIASES or not all(
        key.isascii() and key.isdigit() and len(key) < 10 and -100 <= bias <= 100 for key, bias in value.items()
    ):
        message = f"At most {MAX_LOGIT_BIASES} token ids, each with a bias of -100 to 100, are taken."
        raise PydanticCustomError("logit_bias_value", "{expected}", {"expected": message})
    return tuple((int(key), float(bias)) for key, bias in value.items())


def _limit(value: int) -> int:
    """Accept at least one token, or `NO_LIMIT`. OpenAI and vLLM refuse 0 too."""
    if value == 0 or value < NO_LIMIT:
        raise PydanticCustomError("limit_value", "It must be at least 1, or -1 for the rest of the context.")
    return value


def _up_to_the_first_wrong(value: Any) -> Any:
    """A list without what comes after the first item that is no object.

    Pydantic would describe each wrong item. For a million items this takes 10 s, during which no other thread runs.
    """
    if not isinstance(value, list):
        return value
    wrong = next((index for index, item in enumerate(value) if not isinstance(item, dict)), len(value))
    return value[: wrong + 1]


def _none_if_false(value: Any) -> Any:
    return None if value is False else value


off_if_false = BeforeValidator(_none_if_false, json_schema_input_type=int | bool | None)
"""Takes false, which some clients send for a number that they leave out, as null."""
MaxTokens = Annotated[
    int, AfterValidator(_limit), WithJsonSchema({"type": "integer", "anyOf": [{"const": NO_LIMIT}, {"minimum": 1}]})
]
Stops = Annotated[tuple[str, ...], BeforeValidator(_stops, json_schema_input_type=str | list[str] | None)]
LogitBias = Annotated[
    tuple[tuple[int, float], ...], BeforeValidator(_logit_bias, json_schema_input_type=dict[str, float] | None)
]
Messages = Annotated[
    list[dict[str, Any]], BeforeValidator(_up_to_the_first_wrong, json_schema_input_type=list[Message])
]
BlockMessages = Annotated[
    list[dict[str, Any]], BeforeValidator(_up_to_the_first_wrong, json_schema_input_type=list[BlockMessage])
]
"""Messages in Anthropic's schema."""


class RequestModel(BaseModel):
    """A request body: strict types, no unknown fields, no NaN and no Infinity."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DrawFields(RequestModel):
    """How tokens are chosen, whose cache the prompt may use, and which requests come first.

    A field that is null or left out has the model's default, or OpenAI's if the model has none.
    """

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    """0 is greedy: the likeliest token alone."""
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    """0 and -1 are off."""
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    """-1 is none. Any other negative seed is the same as the unsigned one with its 64 bits."""
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_CACHE_SALT_CHARS)
    """See `GenerationRequest`. An extension that vLLM has too."""
    priority: RequestPriority = None
    """`batch` starts when no `interactive` request waits, and yields to those that come. vLLM's numbers are taken too:
    0 is interactive, higher ones are batch."""
    service_tier: str | None = Field(None, max_length=512)
    """`flex` is `priority: "batch"`, unless `priority` says something else. Other tiers change nothing."""

    @property
    def asked_priority(self) -> Priority:
        """The class that the fields ask for."""
        flex = Priority.BATCH if self.service_tier == FLEX else Priority.INTERACTIVE
        return flex if self.priority is None else self.priority

    def sampling(self) -> dict[str, Any]:
        """As arguments of `CompletionParams`."""
        named = {name: getattr(self, name) for name in DrawFields.model_fields if name != "service_tier"}
        return {**named, "cache_salt": self.cache_salt or "", "priority": self.asked_priority}


class SamplingFields(DrawFields):
    """How tokens are chosen, and where the answer stops."""

    stop: Stops = ()
    """The answer ends before the first of these that appears."""

    def sampling(self) -> dict[str, Any]:
        """As arguments of `CompletionParams`."""
        return {**super().sampling(), "stop": self.stop}


class OpenModel(RequestModel):
    """A part of a request to another API's endpoints. It keeps unknown fields: `validate_open` refuses or reports them.

    The tables are for fields of the request itself, and not for those of its parts.
    """

    model_config = ConfigDict(extra="allow")
    no_effect: ClassVar[Collection[str]] = NO_EFFECT
    """Unknown fields that are not reported."""
    not_served: ClassVar[Mapping[str, tuple[Any, ...]]] = NOT_SERVED
    """Unknown fields that are refused -> their harmless values."""


def _predicted(value: Any) -> Any:
    """A text, or a list of text parts, which are joined as those of a message are -> a text."""
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        raise PydanticCustomError("content_type", "A string or a list of text parts is expected.")
    return "\n".join(part["text"] for part in parts)


class Prediction(OpenModel):
    """`prediction`: what the caller expects of the answer, to get it sooner. It changes no token."""

    type: Literal["content"]
    content: Annotated[str, BeforeValidator(_predicted)]


class StreamOptions(OpenModel):
    """`stream_options`. `include_obfuscation` pads events against eavesdroppers at OpenAI; here it does nothing."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """With `include_usage`: the usage so far in every chunk, as in vLLM."""
    include_obfuscation: bool | None = None


class OpenAIFields(SamplingFields, OpenModel):
    """The fields that /v1/chat/completions and /v1/completions share.

    From `min_tokens` on they are extensions that vLLM has too.
    """

    model: str | None = None
    """Left out or empty: the one model that is served."""
    repeat_penalty: float | None = Field(None, ge=0.01, le=100)
    """llama.cpp's and Ollama's name of `repetition_penalty`."""
    n: int | None = Field(None, ge=1, le=MAX_CHOICES_PER_PROMPT)
    logit_bias: LogitBias = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prediction: Prediction | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    """`flex` is `priority: "batch"`. The answer has `flex` or `default`, if the request names a tier."""
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    prompt_logprobs: Annotated[int | None, off_if_false] = Field(None, ge=0, le=MAX_PROMPT_LOGPROBS)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None

    def params(self, *, max_tokens: int | None, logprobs: int | None, echo: bool = False) -> CompletionParams:
        """The parameters of the request. Its schema gives the arguments, which the two schemas write differently.

        Raises `ApiError`.
        """
        if self.repeat_penalty is not None and self.repetition_penalty not in (None, self.repeat_penalty):
            raise bad_request("Give repetition_penalty or repeat_penalty, not both.", param="repeat_penalty")
        if self.stream and self.prompt_logprobs is not None:
            message = "prompt_logprobs can't be streamed; on /v1/completions, echo and logprobs can."
            raise bad_request(message, param="prompt_logprobs", code="invalid_value")
        if self.truncate_prompt_tokens == 0:
            message = "truncate_prompt_tokens must be at least 1, or -1 for what fits the context."
            raise bad_request(message, param="truncate_prompt_tokens", code="invalid_value")
        asked = [self.prompt_logprobs, logprobs if echo else None]
        sampling = self.sampling()
        if self.repeat_penalty is not None:
            sampling["repetition_penalty"] = self.repeat_penalty
        return CompletionParams(
            **sampling,
            max_tokens=None if max_tokens == NO_LIMIT else max_tokens,
            n=self.n or 1,
            logprobs=logprobs,
            logit_bias=self.logit_bias,
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            prompt_logprobs=max((top for top in asked if top is not None), default=None),
            echo=echo,
            streamed=bool(self.stream),
            truncate_to=self.truncate_prompt_tokens,
            keep_first=self.truncation_side == "right",
        )


Model = TypeVar("Model", bound=RequestModel)


def validate(model: type[Model], data: Mapping[str, Any], *, from_text: bool = False) -> Model:
    """`data` as a `model`. `from_text`: the values are strings of a query. Raises `ApiError`."""
    if model.model_config.get("extra") == "forbid":
        for name in data:
            if name not in model.model_fields:  # pydantic would first describe each of 400,000 unknown fields
                raise unknown_parameter(name)
    try:
        return model.model_validate(data, strict=False if from_text else None)
    except ValidationError as error:
        raise from_validation(error) from None


Open = TypeVar("Open", bound=OpenModel)


def validate_open(model: type[Open], data: Mapping[str, Any], unknown: UnknownFields) -> Open:
    """`data` as a `model`. Unknown fields go to `unknown`. Raises `ApiError`, also for one that can't be ignored."""
    request = validate(model, data)
    _judge(request, "", unknown)
    return request


def _judge(part: OpenModel, prefix: str, unknown: UnknownFields) -> None:
    """Refuse or report the unknown fields of `part` and of the models inside it. Null counts as left out."""
    for name, value in (part.model_extra or {}).items():
        if not prefix:
            refuse_if_not_served(name, value, part.not_served)
        silent = name in part.not_served or name in part.no_effect
        if value is not None and (prefix or not silent):
            unknown.add(prefix + name)
    for name in type(part).model_fields:
        if isinstance(inner := getattr(part, name), OpenModel):
            _judge(inner, f"{prefix}{name}.", unknown)
