"""The class of a request: how fields name it, and whether the caller's key allows it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from serve_app.access.caller import Caller
from serve_app.api.errors import ApiError
from serve_app.core import Priority

FLEX = "flex"
"""The `service_tier` that asks for a slower and cheaper answer at OpenAI. Here it is the class `batch`."""


def _priority(value: Any) -> Any:
    """A class by its name, or by vLLM's number: 0 is interactive, higher ones are batch."""
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit() and len(value) < 20:
        value = int(value)  # in a query all values are strings
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            message = "Nothing comes before interactive requests, which have 0; higher numbers are batch."
            raise PydanticCustomError("priority_value", "{expected}", {"expected": message})
        return Priority.BATCH if value else Priority.INTERACTIVE
    return Priority(value) if value in tuple(Priority) else value


RequestPriority = Annotated[
    Annotated[Priority, Field(strict=False)] | None,
    BeforeValidator(_priority, json_schema_input_type=Literal["interactive", "batch"] | int | None),
    WithJsonSchema({"anyOf": [{"enum": [*Priority]}, {"type": "integer", "minimum": 0}, {"type": "null"}]}),
]


def require_allowed(priority: Priority, caller: Caller) -> None:
    """Raise `ApiError` (403) if the caller's key does not allow requests of this class."""
    if priority not in caller.priorities:
        allowed = " and ".join(f"'{one}'" for one in sorted(caller.priorities)) or "no class"
        message = f"The key '{caller.name}' does not allow priority '{priority}'; it allows {allowed}."
        raise ApiError(403, message, param="priority", code="priority_not_allowed")
