"""The shape of fields that are read by code and not by pydantic, for the OpenAPI document.

Messages and tools are walked by `chat` and by each format, which report unknown fields by their places. These types
validate nothing.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Described(BaseModel):
    """Part of a request. Unknown fields are ignored or refused where it is read."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class ContentPart(Described):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunctionText(Described):
    """The function that an assistant called."""

    name: str
    arguments: str | dict[str, Any]
    """A JSON object, as text or as it is."""


class PastCall(Described):
    """A call that an assistant made."""

    id: str
    type: Literal["function"]
    function: CalledFunctionText


class Message(Described):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[PastCall] | None = None
    """The calls of an assistant."""
    tool_call_id: str | None = None
    """The call that a tool's message answers."""
    reasoning_content: str | None = None
    """How an assistant came to its answer. It goes into the prompt if the model's template reads it."""


class FunctionDescription(Described):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema of its arguments, an object."""
    strict: bool | None = None
    """The arguments must match the schema."""


class FunctionTool(Described):
    """A tool."""

    type: Literal["function"]
    function: FunctionDescription


class ChosenName(Described):
    """The name of a function."""

    name: str


class ChosenFunction(Described):
    """The function that must be called."""

    type: Literal["function"]
    function: ChosenName


class NamedSchema(Described):
    """A JSON Schema with a name."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    """JSON Schema."""
    strict: bool | None = None
    """Changes nothing: answers always match."""


class ResponseFormat(Described):
    """What the text of an answer must be."""

    type: Literal["text", "json_object", "json_schema", "grammar"]
    json_schema: NamedSchema | None = None
    """For `json_schema`."""
    grammar: str | None = None
    """For `grammar`: in Lark's syntax or llama.cpp's."""


class StructuredOutputs(Described):
    """vLLM's: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    """JSON Schema, or its text."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Block(Described):
    """A block of an Anthropic message."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]


class BlockMessage(Described):
    """A message of Anthropic's schema."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class InputTool(Described):
    """A tool of Anthropic's schema."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
