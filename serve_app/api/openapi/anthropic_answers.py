"""What Anthropic's endpoints answer, as types: for the OpenAPI document. A test holds real answers against them."""

from __future__ import annotations

from typing import Any, Literal

from serve_app.api.openapi.openai_answers import Document

StopReason = Literal["end_turn", "max_tokens", "model_context_window_exceeded", "stop_sequence", "tool_use"]


class AnthropicErrorDetails(Document):
    """More about an error."""

    error_code: str


class AnthropicProblem(Document):
    """What is wrong, and what to do."""

    type: str
    message: str
    details: AnthropicErrorDetails | None = None


class AnthropicError(Document):
    """Anthropic's error object. In a stream it is the data of the event `error`."""

    type: Literal["error"]
    error: AnthropicProblem
    request_id: str


class TextBlock(Document):
    """What the model says."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Document):
    """What the model reasons."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(Document):
    """A call that the model makes."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock


class ThinkingTokens(Document):
    """More about `output_tokens`."""

    thinking_tokens: int


class MessageUsage(Document):
    """Tokens of a request. `input_tokens` are those that were not in a cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens
    service_tier: Literal["standard"] | None = None


class AnthropicMessage(Document):
    """An answer, whole or about to begin."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    stop_details: None
    container: None
    usage: MessageUsage


class MessageStart(Document):
    """The first event of a stream."""

    type: Literal["message_start"]
    message: AnthropicMessage


class BlockStart(Document):
    """A block begins."""

    type: Literal["content_block_start"]
    index: int
    content_block: Block


class TextDelta(Document):
    """More text."""

    type: Literal["text_delta"]
    text: str


class ThinkingDelta(Document):
    """More reasoning."""

    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(Document):
    """The signature of a thinking block, at its end."""

    type: Literal["signature_delta"]
    signature: str


class InputDelta(Document):
    """More of a call's input, as a piece of JSON."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(Document):
    """More of a block."""

    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockStop(Document):
    """A block ends."""

    type: Literal["content_block_stop"]
    index: int


class MessageEnd(Document):
    """Why the answer stopped."""

    stop_reason: StopReason
    stop_sequence: str | None
    stop_details: None
    container: None


class MessageDelta(Document):
    """The end of the answer, with its usage."""

    type: Literal["message_delta"]
    delta: MessageEnd
    usage: MessageUsage


class MessageStop(Document):
    """The last event of a stream."""

    type: Literal["message_stop"]


class CountedTokens(Document):
    """Tokens of a prompt."""

    input_tokens: int


class AnthropicModel(Document):
    """The model that is served, for Anthropic's clients."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int
    max_tokens: int


class AnthropicModels(Document):
    """All models that are served, for Anthropic's clients."""

    data: list[AnthropicModel]
    has_more: Literal[False]
    first_id: str | None
    last_id: str | None


EVENTS = (MessageStart, BlockStart, BlockDelta, BlockStop, MessageDelta, MessageStop, AnthropicError)
