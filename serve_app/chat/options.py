"""What a caller may choose about how a chat is written, besides its messages.

Promises values that can't harm a template: no containers, no long texts. Knows no template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TemplateValue = str | int | float | bool | None
MAX_VALUE_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    """JSON Schema of its arguments, an object; None: any object."""
    strict: bool = False
    """Arguments must match the schema."""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What the model may do with the tools: call some if it likes, none, at least one, or this one."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""
    """The one tool of `named`."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """The defaults are those of a chat that wants an answer."""

    variables: Mapping[str, TemplateValue] = field(default_factory=dict)
    """Variables of the template's own, e.g. `enable_thinking`. Strings among them are treated like a user's text."""
    add_generation_prompt: bool = True
    """End the prompt with what begins an assistant's answer."""
    continue_final_message: bool = False
    """Leave the last message open, so that the model continues it. Goes without `add_generation_prompt`."""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    """The answer may have several calls."""
    text_grammar: str = ""
    """What the text of the answer must match, in the form of `GenerationRequest.constraint`. Empty: anything."""
    split_reasoning: bool = True
    """Tell the model's reasoning apart from its text. False: all of it is text."""
    show_reasoning: bool = True
    """False: the answer leaves the reasoning out, where it is told apart."""


DEFAULT_OPTIONS = ChatOptions()


def is_template_value(value: object) -> bool:
    """Whether a caller may give a template this value."""
    return value is None or isinstance(value, int | float) or (isinstance(value, str) and len(value) <= MAX_VALUE_CHARS)
