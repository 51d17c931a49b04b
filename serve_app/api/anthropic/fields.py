"""The fields of a request to Anthropic's messages endpoints.

Promises that what passes has the right type and range, and that a field which is not served is refused or reported.
Knows no template. Source: the package anthropic, `types/message_create_params.py` and `types/beta/`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, SkipValidation

from serve_app.api.described import ContentPart, InputTool
from serve_app.api.errors import bad_request
from serve_app.api.fields import BlockMessages, DrawFields, OpenModel, Stops
from serve_app.api.structured import StructuredFields
from serve_app.api.unknown_fields import NOT_SERVED, UnknownFields, unsupported
from serve_app.generation.request import CompletionParams

_NO_EFFECT = frozenset({"metadata", "cache_control", "anthropic_version", "anthropic_beta"})
"""Fields that change nothing in an answer: accepted with any value, and not reported. Every prompt is cached here, so
`cache_control` has nothing to add. The last two stand in the body at Amazon's and Google's endpoints."""

_NOT_SERVED = {
    **NOT_SERVED,
    # Anthropic's own: services around a model
    "container": (),
    "mcp_servers": (),
    "compaction": (),
    "thread": (),
    # Those of OpenAI's endpoints
    "stop": (),
    "n": (1,),
    "logprobs": (),
    "top_logprobs": (0,),
    "logit_bias": (),
    "min_tokens": (0,),
    "ignore_eos": (),
    "stop_token_ids": (),
    "max_completion_tokens": (),
    "repeat_penalty": (1,),
    **dict.fromkeys(StructuredFields.model_fields, ()),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True,),
    "chat_template_kwargs": (),
    "reasoning_effort": (),
    "verbosity": (),
    "enable_thinking": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (),
    "prompt_logprobs": (),
    "return_token_ids": (),
    "truncate_prompt_tokens": (),
}
"""Fields that would change an answer in a way that is not served here -> their harmless values."""

_CLEAR_THINKING = "clear_thinking_"


class Thinking(OpenModel):
    """`thinking`. The model has no budget for it: `budget_tokens` is reported as ignored."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None
    """`omitted`: thinking blocks come without their text. There are no summaries: the whole text comes."""


class ToolChoiceFields(OpenModel):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(OpenModel):
    """`output_config.format`, which an earlier version of the API called `output_format`."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(OpenModel):
    """`output_config`."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class PromptFields(OpenModel):
    """What makes the prompt: the body of POST /v1/messages/count_tokens."""

    no_effect: ClassVar = _NO_EFFECT
    not_served: ClassVar = _NOT_SERVED

    model: str | None = None
    """Left out or empty: the one model that is served."""
    messages: BlockMessages
    system: SkipValidation[str | list[ContentPart] | None] = None
    """A text, or a list of text blocks."""
    tools: SkipValidation[list[InputTool] | None] = None
    tool_choice: ToolChoiceFields | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    context_management: dict[str, Any] | None = None

    @property
    def schema_of_text(self) -> OutputFormat | None:
        """The format that the answer's text must have."""
        return (self.output_config and self.output_config.format) or self.output_format

    @property
    def constraint_param(self) -> str:
        """The name of the field that says what the answer must match."""
        if self.output_config is not None and self.output_config.format is not None:
            return "output_config.format"
        return "output_format" if self.output_format is not None else "tools"

    def check(self, unknown: UnknownFields) -> None:
        """Report what is ignored inside the fields. Raises `ApiError` for what can't be served."""
        if self.thinking is not None and self.thinking.budget_tokens is not None:
            unknown.add("thinking.budget_tokens")
        self._check_context_management(unknown)

    def _check_context_management(self, unknown: UnknownFields) -> None:
        """The edits that clear old thinking are ignored: templates leave old thinking out by themselves."""
        asked = self.context_management or {}
        edits = asked.get("edits") or []
        if not isinstance(edits, list) or not all(isinstance(edit, dict) for edit in edits):
            message = "context_management.edits must be a list of objects."
            raise bad_request(message, param="context_management.edits", code="invalid_type")
        for index, edit in enumerate(edits):
            kind, where = str(edit.get("type"))[:100], f"context_management.edits[{index}]"
            if not kind.startswith(_CLEAR_THINKING):
                raise unsupported(where, f"edits of the type '{kind}' are not supported by this server.")
            unknown.add(where)
        for name in asked:
            if name != "edits":
                unknown.add_in("context_management", name)


class MessagesFields(DrawFields, PromptFields):
    """The body of POST /v1/messages.

    `seed`, `min_p`, the penalties and `cache_salt` are extensions, as on the other endpoints.
    """

    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(None, ge=0, le=1)
    stop_sequences: Stops = ()
    stream: bool | None = None

    def params(self) -> CompletionParams:
        """As a completion."""
        return CompletionParams(**self.sampling(), stop=self.stop_sequences, max_tokens=self.max_tokens)


class CountFields(DrawFields, PromptFields):
    """The body of POST /v1/messages/count_tokens.

    The fields that change no prompt may stand in it: clients count the body that they are about to send.
    """

    max_tokens: int | None = None
    stop_sequences: Stops = ()
    stream: bool | None = None
