"""The request fields that say what an answer must match: OpenAI's `response_format`, and those of vLLM, SGLang and
llama.cpp.

Promises one grammar from one field, or a 400 that names the field. Whether the grammar can be used is checked
afterwards, since it may take a second. Knows no endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import SkipValidation
from pydantic_core import from_json

from serve_app.api.described import ResponseFormat, StructuredOutputs
from serve_app.api.errors import ApiError, bad_request
from serve_app.api.fields import OpenModel
from serve_app.api.unknown_fields import UnknownFields, unsupported
from serve_app.chat.grammar import (
    GrammarTextError,
    choice_grammar,
    ebnf_grammar,
    json_object_grammar,
    json_schema_grammar,
    regex_grammar,
)
from serve_app.grammar import NO_EXTENSION

FORMATS = ("text", "json_object", "json_schema", "grammar")
MAX_REASON_CHARS = 300
"""An error repeats at most this much of llguidance's own words, which may hold the caller's text."""
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*)\]")
_NO_SCHEMA = frozenset({"regex", "choice", "grammar", "ebnf", "guided_regex", "guided_choice", "guided_grammar"})
"""Last parts of the names of fields that hold no JSON Schema."""


class Wanted(NamedTuple):
    """What an answer must match."""

    grammar: str = ""
    """In the form of `GenerationRequest.constraint`; empty: anything."""
    param: str = "response_format"
    """The field that says so."""


class StructuredFields(OpenModel):
    """At most one of these fields may be given. Null, false, empty and `{"type": "text"}` count as left out."""

    response_format: SkipValidation[ResponseFormat | None] = None
    guided_json: SkipValidation[dict[str, Any] | str | None] = None
    """vLLM's earlier name of `structured_outputs.json`; so are the next three."""
    guided_regex: SkipValidation[str | None] = None
    guided_choice: SkipValidation[list[str] | None] = None
    guided_grammar: SkipValidation[str | None] = None
    structured_outputs: SkipValidation[StructuredOutputs | None] = None
    """vLLM's."""
    regex: SkipValidation[str | None] = None
    """SGLang's."""
    ebnf: SkipValidation[str | None] = None
    """SGLang's: a grammar."""
    json_schema: SkipValidation[dict[str, Any] | str | None] = None
    """SGLang's and llama.cpp's."""
    grammar: SkipValidation[str | None] = None
    """llama.cpp's."""


def wanted(fields: StructuredFields, unknown: UnknownFields) -> Wanted:
    """What the answer must match. Unknown fields inside go to `unknown`. Raises `ApiError`."""
    found = [
        Wanted(grammar, param)
        for name in StructuredFields.model_fields
        if (value := getattr(fields, name))
        for grammar, param in [_read(name, value, unknown)]
        if grammar
    ]
    if len(found) > 1:
        names = " and ".join(f"'{one.param}'" for one in found[:2])
        raise bad_request(f"Give only one of {names}.", param=found[1].param, code="invalid_value")
    return found[0] if found else Wanted()


def format_grammar(value: Any, where: str, unknown: UnknownFields) -> str:
    """The grammar of a `response_format` of chats or a `text.format` of responses; empty for plain text.

    `where`: the field's name. A JSON Schema stands in `json_schema.schema`, or in `schema` itself. Raises `ApiError`.
    """
    if not isinstance(value, dict):
        raise _wrong_type(where, "An object is expected.")
    match value.get("type"):
        case "text":
            known, grammar = {"type"}, ""
        case "json_object":
            known = {"type", "schema"}  # llama.cpp and others take a schema here
            grammar = schema_grammar(value["schema"], where) if value.get("schema") else json_object_grammar()
        case "json_schema":
            known, grammar = {"type", "json_schema"}, _described(value, where, unknown)
            known |= set() if "json_schema" in value else _DESCRIPTION
        case "grammar":
            known, grammar = {"type", "grammar"}, _grammar(value.get("grammar"), where)
        case _:
            param, kinds = f"{where}.type", ", ".join(f"'{kind}'" for kind in FORMATS)
            message = f"Invalid value for '{param}': it must be one of {kinds}."
            raise bad_request(message, param=param, code="invalid_value")
    for name in value.keys() - known:
        unknown.add_in(where, name)
    return grammar


def refusal(reason: str, param: str) -> ApiError:
    """400 for a grammar that can't be used. `reason`: `GrammarChecker.fault`'s."""
    reason = reason.removeprefix("the grammar can't be used: ")
    if (found := _UNIMPLEMENTED.search(reason)) is not None:
        keys = found[1].replace('"', "'")
        reason = f"{'the keywords' if ',' in keys else 'the keyword'} {keys} can't be enforced"
    elif NO_EXTENSION in reason:
        reason = "nothing can match it"
    if len(reason) > MAX_REASON_CHARS:
        reason = reason[:MAX_REASON_CHARS] + "..."
    is_schema = param.rpartition(".")[2] not in _NO_SCHEMA
    kind, code = ("schema", "invalid_json_schema") if is_schema else ("grammar", "invalid_value")
    return bad_request(f"Invalid {kind} in '{param}': {reason.rstrip('.')}.", param=param, code=code)


_DESCRIPTION = {"name", "schema", "strict", "description"}


def _described(value: Mapping[str, Any], where: str, unknown: UnknownFields) -> str:
    """The grammar of a schema with a name. Output always matches it, whether `strict` or not."""
    described = value
    if "json_schema" in value:
        described, where = value["json_schema"], f"{where}.json_schema"
        if not isinstance(described, dict):
            raise _wrong_type(where, "An object is expected.")
        for name in described.keys() - _DESCRIPTION:
            unknown.add_in(where, name)
    if described.get("schema") is None:
        param = f"{where}.schema"
        raise bad_request(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    return schema_grammar(described["schema"], where.partition(".json_schema")[0])


def _read(name: str, value: Any, unknown: UnknownFields) -> Wanted:
    if name == "response_format":
        return Wanted(format_grammar(value, name, unknown), name)
    if name != "structured_outputs":
        return Wanted(_FIELDS[name](value, name), name)
    if not isinstance(value, dict):
        raise _wrong_type(name, "An object is expected.")
    given = [key for key, of_key in value.items() if of_key]
    for key in given:
        if key in _OUTPUTS_NOT_SERVED:
            raise unsupported(f"{name}.{key}")
        if key not in _OUTPUTS:
            unknown.add_in(name, key)
    outputs = [key for key in given if key in _OUTPUTS]
    if len(outputs) != 1:
        kinds = ", ".join(_OUTPUTS)
        raise bad_request(f"'{name}' needs exactly one of {kinds}.", param=name, code="invalid_value")
    param = f"{name}.{outputs[0]}"
    return Wanted(_OUTPUTS[outputs[0]](value[outputs[0]], param), param)


def schema_grammar(value: Any, where: str) -> str:
    """The grammar of a JSON Schema, which may be given as its text. `where`: the field. Raises `ApiError`."""
    if isinstance(value, str):
        try:
            value = from_json(value, allow_inf_nan=False)
        except ValueError as error:
            raise refusal(f"it is not valid JSON: {error}", where) from None
    if not isinstance(value, dict):
        raise _wrong_type(where, "A JSON Schema, which is an object, is expected.")
    return _made(json_schema_grammar, value, where)


def _regex(value: Any, where: str) -> str:
    return _made(regex_grammar, _text(value, where), where)


def _grammar(value: Any, where: str) -> str:
    return _made(ebnf_grammar, _text(value, where), where)


def _choice(value: Any, where: str) -> str:
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise _wrong_type(where, "A list of strings is expected.")
    return _made(choice_grammar, value, where)


def _object(value: Any, where: str) -> str:
    if value is not True:
        raise _wrong_type(where, "A boolean is expected.")
    return json_object_grammar()


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(where, "A string is expected.")
    return value


def _made(make: Callable[[Any], str], value: Any, where: str) -> str:
    try:
        return make(value)
    except GrammarTextError as error:
        raise refusal(str(error), where) from None


def _wrong_type(where: str, expected: str) -> ApiError:
    return bad_request(f"Invalid type for '{where}': {expected}", param=where, code="invalid_type")


_FIELDS: Mapping[str, Callable[[Any, str], str]] = {
    "guided_json": schema_grammar,
    "json_schema": schema_grammar,
    "guided_regex": _regex,
    "regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
    "ebnf": _grammar,
    "grammar": _grammar,
}
_OUTPUTS: Mapping[str, Callable[[Any, str], str]] = {
    "json": schema_grammar,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _object,
}
_OUTPUTS_NOT_SERVED = frozenset(
    {"structural_tag", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"}
)
