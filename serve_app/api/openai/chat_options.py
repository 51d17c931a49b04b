"""Which fields of a chat request say how its prompt is written: `chat_template_kwargs` and their relatives.

Promises that a template gets only variables of its own, and that what it does not know is ignored and named.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

from serve_app.api.errors import bad_request
from serve_app.api.unknown_fields import UnknownFields
from serve_app.chat.options import MAX_VALUE_CHARS, ChatOptions, TemplateValue, is_template_value

KWARGS = "chat_template_kwargs"


def chat_options(
    kwargs: Mapping[str, Any],
    fields: Mapping[str, Any],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool,
    known: Collection[str],
    unknown: UnknownFields,
) -> ChatOptions:
    """The options of a request. Raises `ApiError`.

    `fields` are those of the request that set a variable of the same name where the template has one, unless `kwargs`
    do. `known`: the variables that the template leaves to its callers.
    """
    if add_generation_prompt and continue_final_message:
        message = "add_generation_prompt begins a new answer, so it can't be combined with continue_final_message."
        raise bad_request(message, param="continue_final_message", code="invalid_value")
    variables: dict[str, TemplateValue] = {}
    named = {name: (f"{KWARGS}.{name}", value) for name, value in kwargs.items()}
    for name, value in fields.items():
        named.setdefault(name, (name, value))
    for name, (param, value) in named.items():
        if value is None:
            continue
        if name not in known:
            unknown.add(param)
        elif not is_template_value(value):
            message = f"A number, a boolean or a text of at most {MAX_VALUE_CHARS} characters is expected."
            raise bad_request(f"Invalid value for '{param}': {message}", param=param, code="invalid_value")
        else:
            variables[name] = cast(TemplateValue, value)
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    return ChatOptions(variables, add_generation_prompt, continue_final_message)
