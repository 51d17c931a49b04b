"""What the Responses API answers, as types: for the OpenAPI document. A test holds real answers against them."""

from __future__ import annotations

from typing import Any, Literal

from serve_app.api.openapi.openai_answers import Document

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["completed", "failed", "in_progress", "cancelled", "queued", "incomplete"]


class TokenAlternative(Document):
    """A token with its logprob."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    """Not in events."""


class ResponseLogprob(TokenAlternative):
    """A token of the text with those that were likeliest in its place."""

    top_logprobs: list[TokenAlternative]


class OutputText(Document):
    """A part of what the model says."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ResponseLogprob] | None = None


class InputText(Document):
    """A part of what the model was told."""

    type: Literal["input_text"]
    text: str


class Refusal(Document):
    """What another model refused with, handed back."""

    type: Literal["refusal"]
    refusal: str


class ReasoningText(Document):
    """A part of the model's reasoning."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class MessageItem(Document):
    """What somebody says."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["user", "system", "developer", "assistant"]
    content: list[OutputText | InputText | Refusal]


class ReasoningItem(Document):
    """What the model reasons."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus | None = None
    summary: list[ReasoningText]
    content: list[ReasoningText]


class FunctionCallItem(Document):
    """A call that the model makes."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(Document):
    """What a call gave."""

    id: str
    type: Literal["function_call_output"]
    status: ItemStatus
    call_id: str
    output: str | list[InputText]


class CompactionItem(Document):
    """A conversation up to here, summarised by the model."""

    id: str
    type: Literal["compaction"]
    encrypted_content: str


Item = MessageItem | ReasoningItem | FunctionCallItem | FunctionCallOutputItem | CompactionItem


class InputTokensDetails(Document):
    """More about `input_tokens`."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Document):
    """More about `output_tokens`."""

    reasoning_tokens: int


class ResponseUsage(Document):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseProblem(Document):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(Document):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseReasoning(Document):
    """How the model was to reason."""

    effort: str | None
    summary: None


class ResponseText(Document):
    """The form of the text."""

    format: dict[str, Any]
    verbosity: str | None


class ResponseDocument(Document):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    status: ResponseStatus
    background: bool
    completed_at: None
    error: ResponseProblem | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ResponseReasoning
    safety_identifier: str | None
    service_tier: Literal["default", "flex"]
    store: bool
    temperature: float
    text: ResponseText
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]


class _Numbered(Document):
    sequence_number: int
    """The number of the event, from 0."""


class ResponseEvent(_Numbered):
    """What became of the response, with all of it so far."""

    type: Literal[
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseDocument


class ItemEvent(_Numbered):
    """An item begins or ends."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: Item


class _OfItem(_Numbered):
    item_id: str
    output_index: int


class PartEvent(_OfItem):
    """A part of an item begins or ends."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: OutputText | ReasoningText


class OutputTextDelta(_OfItem):
    """More text."""

    type: Literal["response.output_text.delta"]
    content_index: int
    delta: str
    logprobs: list[ResponseLogprob]


class OutputTextDone(_OfItem):
    """All of the text."""

    type: Literal["response.output_text.done"]
    content_index: int
    text: str
    logprobs: list[ResponseLogprob]


class ReasoningTextDelta(_OfItem):
    """More reasoning."""

    type: Literal["response.reasoning_text.delta"]
    content_index: int
    delta: str


class ReasoningTextDone(_OfItem):
    """All of the reasoning."""

    type: Literal["response.reasoning_text.done"]
    content_index: int
    text: str


class ArgumentsDelta(_OfItem):
    """More of the arguments of a call."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(_OfItem):
    """All arguments of a call."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ErrorEvent(_Numbered):
    """What is wrong with this stream, though not with the response."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None


class DeletedResponse(Document):
    """A response that is no more."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(Document):
    """Some of the items that the model read."""

    object: Literal["list"]
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class CountedInput(Document):
    """Tokens of an input."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class CompactedResponse(Document):
    """The user's messages and a summary."""

    id: str
    object: Literal["response.compaction"]
    created_at: int
    output: list[MessageItem | CompactionItem]
    usage: ResponseUsage


EVENTS = (
    ResponseEvent,
    ItemEvent,
    PartEvent,
    OutputTextDelta,
    OutputTextDone,
    ReasoningTextDelta,
    ReasoningTextDone,
    ArgumentsDelta,
    ArgumentsDone,
    ErrorEvent,
)
