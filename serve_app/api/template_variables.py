"""The variables of a chat template that a request sets: in `chat_template_kwargs`, or by fields of their own.

Knows no endpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

from serve_app.api.errors import bad_request
from serve_app.api.unknown_fields import UnknownFields
from serve_app.chat.options import MAX_VALUE_CHARS, TemplateValue, is_template_value

THINKING_SWITCHES = frozenset({"enable_thinking", "thinking"})
"""Variables by which chat templates turn the model's reasoning on and off."""


def template_variables(
    kwargs: Mapping[str, Any] | None,
    fields: Mapping[str, tuple[str, Any]],
    known: Collection[str],
    unknown: UnknownFields,
) -> dict[str, TemplateValue]:
    """The variables that the template knows; a field that sets any other goes to `unknown`. Raises `ApiError`.

    `kwargs`: the request's `chat_template_kwargs`, which take precedence. `fields`: name of a variable -> (the field
    that sets it, its value). `known`: the variables that the template leaves to its callers. Null sets nothing. An
    effort of `none` turns the reasoning off, where the template has a switch for it.
    """
    named = {name: (f"chat_template_kwargs.{name}", value) for name, value in (kwargs or {}).items()}
    for name, field in fields.items():
        named.setdefault(name, field)
    switches = THINKING_SWITCHES.intersection(known)
    if named.get("reasoning_effort", ("", None))[1] == "none" and switches:
        param, _ = named.pop("reasoning_effort")
        for name in switches:
            if named.get(name, (name, None))[1] is None:
                named[name] = (param, False)
    variables: dict[str, TemplateValue] = {}
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
    return variables
