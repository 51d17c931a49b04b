"""The variables of a chat template that a request sets. Knows no endpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

from serve_app.api.errors import bad_request
from serve_app.api.unknown_fields import UnknownFields
from serve_app.chat.options import MAX_VALUE_CHARS, TemplateValue, is_template_value

Named = Mapping[str, tuple[str, Any]]
"""Name of a variable -> (the field of the request that sets it, its value)."""


def template_variables(named: Named, known: Collection[str], unknown: UnknownFields) -> dict[str, TemplateValue]:
    """The variables that the template knows; a field that sets any other goes to `unknown`. Raises `ApiError`.

    `known`: the variables that the template leaves to its callers. A field that is null sets nothing.
    """
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
