"""What the endpoints answer, as types: for the OpenAPI document. A test holds real answers against them.

Promises nothing about how answers are made.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Document(BaseModel):
    """Part of an answer: what is listed here is there, and nothing else."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Problem(Document):
    """What is wrong, and what to do."""

    message: str
    type: str
    """OpenAI's error type."""
    param: str | None
    """The request's field, e.g. `messages[0].role`."""
    code: str | None
    """For programs."""


class ErrorAnswer(Document):
    """OpenAI's error object."""

    error: Problem


class PromptTokensDetails(Document):
    """More about `prompt_tokens`."""

    cached_tokens: int
    """Prompt tokens that a replica had in its cache."""


class CompletionTokensDetails(Document):
    """More about `completion_tokens`."""

    reasoning_tokens: int
    """Tokens that the model reasoned with."""
    accepted_prediction_tokens: int | None = None
    """Tokens of the request's `prediction` that the answers have."""
    rejected_prediction_tokens: int | None = None
    """Those that they don't have."""


class Usage(Document):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class StreamedToken(Document):
    """The data of an event of `/stream`: one token."""

    token_id: int
    generated_text: str
    """The text that this token adds; empty while a character is incomplete."""


class StreamDone(Document):
    """The data of the event `done`, the last one of `/stream`."""

    finish_reason: Literal["stop", "length"]
    usage: Usage
    seed: int
    """The same request with this seed gives the same tokens."""


class ServedModel(Document):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ServedModels(Document):
    """All models that are served."""

    object: Literal["list"]
    data: list[ServedModel]


class Health(Document):
    """The process answers."""

    status: Literal["ok"]


class Ready(Document):
    """A model can serve."""

    status: Literal["ready"]
    model: dict[str, Any]
    """The model's card."""
    generation: dict[str, float]
    """Sampling parameters of requests that don't give them."""
    access: dict[str, Any]
    """Whether keys are needed; `warning` if everybody who reaches the service can use it without one."""


class NotReady(Document):
    """No model can serve yet."""

    status: Literal["loading", "failed"]
    stage: str
    fraction: float | None
    """0 to 1 within the stage, null when unknown."""
    error: str | None


class TokenAlternative(Document):
    """A token that could have come, with its logprob."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TokenAlternative):
    """A token of the answer, with its logprob."""

    top_logprobs: list[TokenAlternative]


class ChatLogprobs(Document):
    """Logprobs of a chat's answer."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Document):
    """A function that the model calls."""

    name: str
    arguments: str
    """A JSON object as text."""


class ToolCall(Document):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Document):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    """Null where there are tool calls and no text."""
    refusal: None
    annotations: list[Any] = Field(max_length=0)
    reasoning_content: str | None = None
    """The model's reasoning, where it has some."""
    reasoning: str | None = None
    """The same as `reasoning_content`."""
    tool_calls: list[ToolCall] | None = None


class PromptLogprob(Document):
    """A token that could stand in the prompt, in vLLM's form."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt: token id -> logprob. The first token has none."""


class OfTokens(Document):
    """What `return_token_ids` shows of an answer."""

    token_ids: list[int] | None = None


class OfPrompt(Document):
    """What `return_token_ids` and `prompt_logprobs` show of a prompt."""

    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class ChatChoice(OfTokens):
    """One answer to a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Envelope(Document):
    """The fields around the choices of every answer."""

    id: str
    created: int
    """Unix time in seconds."""
    model: str
    system_fingerprint: str
    """The same fingerprint and seed give the same answer."""
    service_tier: Literal["default", "flex"] | None = None
    """Where the request named a tier."""


class ChatCompletion(Envelope, OfPrompt):
    """A whole answer to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(Document):
    """More of a function call."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Document):
    """More of a tool call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Document):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(OfTokens):
    """What a chunk adds to a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class RunningUsage(Document):
    """Usage in the middle of a stream."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletionChunk(Envelope, OfPrompt):
    """The data of an event of a chat's stream. After the last one comes `[DONE]`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | RunningUsage | None = None


class TextLogprobs(Document):
    """Logprobs of a completion: lists side by side, one entry a token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TextChoice(OfTokens, OfPrompt):
    """One completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(Envelope):
    """Whole completions, or the data of an event of their stream."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | RunningUsage | None = None


class RenderedPrompt(Document):
    """One prompt, as the model would get it."""

    token_ids: list[int]
    text: str
    """The same with special tokens by their names."""
    max_tokens: int
    """The longest answer."""
    constraint: str | None
    """The grammar that the answer has to match, if any."""


class Rendered(Document):
    """What a request would become."""

    model: str
    prompts: list[RenderedPrompt]
    sampling_params: dict[str, Any]
    """With the model's defaults. The seed is null where the request has none: each request then draws its own."""


class Tokenized(Document):
    """The tokens of a text."""

    count: int
    max_model_len: int
    """Longest prompt and answer together."""
    tokens: list[int]
    token_strs: list[str | None] | None
    """Their names in the vocabulary, where they were asked for."""


class Detokenized(Document):
    """The text of tokens, special tokens by their names."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What a client needs to write prompts itself. Other special tokens may be there too."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    tokenizer_class: str
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
