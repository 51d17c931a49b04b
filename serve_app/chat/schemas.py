"""What of a caller's JSON Schema must be known before llguidance reads it.

llguidance refuses by name what it can't enforce. This module takes out what only describes a value, and refuses the few
things that llguidance accepts and does not enforce, or that take too long. Knows no grammar.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)  # fmt: skip
"""The formats that are enforced. Any other one describes a value and is not part of its validity."""
_ONE = ("additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_OPTIONS = "x-guidance"


class SchemaError(ValueError):
    """A schema that can't be used. The message is one sentence without a full stop."""


def checked_schema(schema: Mapping[str, Any] | bool) -> dict[str, Any]:
    """The schema, ready for llguidance. Raises `SchemaError`."""
    if isinstance(schema, bool):
        return {} if schema else {"not": {}}
    if _OPTIONS in schema:
        raise SchemaError(f"'{_OPTIONS}' is not supported")
    result = dict(schema)
    waiting = [result]
    while waiting:
        part = waiting.pop()
        _check(part)
        waiting += _copy_inner(part)
    return result


def _check(part: dict[str, Any]) -> None:
    """Check one schema without those inside it."""
    if isinstance(part.get("format"), str) and part["format"] not in FORMATS:
        del part["format"]
    fewest, required = part.get("minProperties"), part.get("required")
    listed = len(set(map(str, required))) if isinstance(required, list) else 0
    if isinstance(fewest, int) and fewest > listed + 1:
        # llguidance counts properties, and does not see that two have the same name.
        raise SchemaError(f"'minProperties' of {fewest} is not supported with {listed} required properties")


def _copy_inner(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Replace the schemas in `part` by copies, and yield these."""
    for key in _MAPS:
        if isinstance(part.get(key), dict):
            part[key] = copies = {name: _copied(value) for name, value in part[key].items()}
            yield from (copy for copy in copies.values() if isinstance(copy, dict))
    for key in _LISTS:
        if isinstance(part.get(key), list):
            part[key] = items = [_copied(value) for value in part[key]]
            yield from (copy for copy in items if isinstance(copy, dict))
    for key in _ONE:
        if isinstance(part.get(key), dict):
            part[key] = copy = dict(part[key])
            yield copy


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value
