"""What a caller may choose about how a chat is written, besides its messages.

Promises values that can't harm a template: no containers, no long texts. Knows no template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TemplateValue = str | int | float | bool | None
MAX_VALUE_CHARS = 1000


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """The defaults are those of a chat that wants an answer."""

    variables: Mapping[str, TemplateValue] = field(default_factory=dict)
    """Variables of the template's own, e.g. `enable_thinking`. Strings among them are treated like a user's text."""
    add_generation_prompt: bool = True
    """End the prompt with what begins an assistant's answer."""
    continue_final_message: bool = False
    """Leave the last message open, so that the model continues it. Goes without `add_generation_prompt`."""


DEFAULT_OPTIONS = ChatOptions()


def is_template_value(value: object) -> bool:
    """Whether a caller may give a template this value."""
    return value is None or isinstance(value, int | float) or (isinstance(value, str) and len(value) <= MAX_VALUE_CHARS)
