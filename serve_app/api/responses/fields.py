"""The fields of POST /v1/responses: OpenAI's, and the sampling extensions that all endpoints share.

Promises that a field that would change the answer in a way that is not served is refused, and that the others are named
(`unknown_fields`). Knows no item and no replica.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from serve_app.api.errors import bad_request
from serve_app.api.fields import (
    NO_LIMIT,
    MaxTokens,
    OpenModel,
    RequestModel,
    SamplingFields,
    StreamOptions,
    validate_open,
)
from serve_app.api.openai.tools import MAX_TOOLS
from serve_app.api.unknown_fields import UnknownFields, unsupported
from serve_app.generation.request import CompletionParams

MAX_ITEMS = 4096
"""Items of one input. A conversation that is continued may have as many again for each response."""
LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = {
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
}
"""OpenAI's values of `include`. All but the logprobs tell of items that no answer here has."""
_METADATA_PAIRS, _METADATA_NAME_CHARS, _METADATA_VALUE_CHARS = 16, 64, 512
_NOT_SERVED: Mapping[str, str] = {
    "conversation": "conversations are not kept by this server; send previous_response_id or the items.",
    "prompt": "stored prompts are not kept by this server; send instructions and input.",
    "context_management": "call POST /v1/responses/compact when the conversation is long.",
    "moderation": "this server does not moderate.",
    "n": "a response has one answer.",
    "max_tokens": "send max_output_tokens.",
    "max_completion_tokens": "send max_output_tokens.",
    "logprobs": f"send include: ['{LOGPROBS}'].",
    "response_format": "send text.format.",
    "messages": "send input.",
}
"""Fields that would change the answer -> what to do instead."""
_LOWEST_VALUES: Mapping[str, tuple[object, ...]] = {"n": (1,), "logprobs": (False,)}


def _input(value: Any) -> Any:
    if value is not None and not isinstance(value, str | list):
        raise PydanticCustomError("input_type", "A string or a list of items is expected.")
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        raise PydanticCustomError("input_value", f"At most {MAX_ITEMS} items are taken.")
    return value


def _metadata(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise PydanticCustomError("metadata_type", "An object of strings is expected.")
    if len(value) > _METADATA_PAIRS or not all(
        len(name) <= _METADATA_NAME_CHARS and len(text) <= _METADATA_VALUE_CHARS for name, text in value.items()
    ):
        message = (
            f"At most {_METADATA_PAIRS} pairs are taken, with names of {_METADATA_NAME_CHARS} and texts of "
            f"{_METADATA_VALUE_CHARS} characters."
        )
        raise PydanticCustomError("metadata_value", "{expected}", {"expected": message})
    return value


def _includes(value: Any) -> Any:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise PydanticCustomError("include_type", "A list of strings is expected.")
    if unknown := next((name for name in value if name not in _INCLUDABLE), None):
        raise PydanticCustomError("include_value", "{name} can't be included.", {"name": ascii(unknown[:60])})
    return tuple(value)


Input = Annotated[Any, BeforeValidator(_input)]
"""A text, or a list of what should be items."""
Label = Annotated[str, Field(max_length=512)]
Includes = Annotated[tuple[str, ...], BeforeValidator(_includes)]


class TextOptions(OpenModel):
    """`text`."""

    format: dict[str, Any] | None = None
    verbosity: str | None = Field(None, max_length=40)


class ReasoningOptions(OpenModel):
    """`reasoning`. There are no summaries: the reasoning itself is in the answer."""

    effort: str | None = Field(None, max_length=40)
    summary: str | None = Field(None, max_length=40)
    generate_summary: str | None = Field(None, max_length=40)


class ConversationFields(OpenModel):
    """The fields that say what the model reads. /v1/responses/input_tokens and /v1/responses/compact have them too."""

    model: str | None = None
    """Left out or empty: the one model that is served."""
    input: Input = None
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=200)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """An extension that vLLM has too: see /v1/chat/completions."""


class ResponseRequest(SamplingFields, ConversationFields):
    """The body of POST /v1/responses."""

    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: Includes = ()
    max_output_tokens: MaxTokens | None = Field(None, lt=2**31)
    max_tool_calls: int | None = Field(None, ge=0, lt=2**31)
    """It limits calls of built-in tools. There are none, so it changes nothing."""
    metadata: Annotated[dict[str, str] | None, BeforeValidator(_metadata)] = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    service_tier: Label | None = None

    @property
    def logprobs(self) -> int | None:
        """How many alternatives are wanted with each token; None: no logprobs."""
        if self.top_logprobs is not None and self.top_logprobs > 0:
            return self.top_logprobs
        return 0 if LOGPROBS in self.include else None

    def params(self) -> CompletionParams:
        """The parameters of the request."""
        limit = None if self.max_output_tokens == NO_LIMIT else self.max_output_tokens
        return CompletionParams(**self.sampling(), max_tokens=limit, logprobs=self.logprobs)


class RetrieveQuery(RequestModel):
    """The query of GET /v1/responses/{response_id}, for the description of the API."""

    stream: bool | None = None
    """Events instead of the document."""
    starting_after: int | None = Field(None, ge=0, lt=10**9)
    """With `stream`: the `sequence_number` of the last event that arrived."""
    include: list[str] | None = None
    """A response always has all that it can have."""


class ItemsQuery(RequestModel):
    """The query of GET /v1/responses/{response_id}/input_items, for the description of the API."""

    limit: int | None = Field(None, ge=1, le=100)
    """Most items in the answer; default 20."""
    order: Literal["asc", "desc"] | None = None
    """Default `desc`: the newest first."""
    after: str | None = None
    """The id of the last item that arrived."""


Body = TypeVar("Body", bound=ConversationFields)


def read_request(model: type[Body], body: Mapping[str, Any], unknown: UnknownFields) -> Body:
    """The body as a `model`. Raises `ApiError`."""
    for name, hint in _NOT_SERVED.items():
        value = body.get(name)
        if value not in (None, "", [], {}) and value not in _LOWEST_VALUES.get(name, ()):
            raise unsupported(name, hint)
    request = validate_open(model, body, unknown)
    if request.input is None and request.previous_response_id is None:
        raise bad_request("Missing required parameter: 'input'.", param="input", code="missing_required_parameter")
    if request.reasoning is not None:
        for name in ("summary", "generate_summary"):
            if getattr(request.reasoning, name) is not None:
                unknown.add(f"reasoning.{name}")
    if isinstance(request, ResponseRequest):
        for name in dict.fromkeys(request.include):
            if name != LOGPROBS:
                unknown.add(f"include.{name}")
        if request.background and request.store is False:
            raise bad_request("A background response is kept: it needs store: true.", param="store")
    return request
