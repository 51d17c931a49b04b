"""Random JSON Schemas of everything that users write, what can't be enforced included."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

_NAMES = st.sampled_from(["a", "b", "name", 'q"', "x y", "é", "n\n", "a/b", "\\"])
# No number that is another one as Python's int: {"const": 1e30} lets 10**30 through, which is equal in JavaScript.
_VALUES = st.recursive(
    st.sampled_from(["abc", "", 'a"b', "é🙂", "n\n", 1, -7, 2.5, 1e15, True, False, None]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_NAMES, inner, max_size=2),
    max_leaves=4,
)


def _parts(**parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Schema]:
    """A schema with any of these keywords."""
    return st.fixed_dictionaries({}, optional=parts)


_STRINGS = _parts(
    minLength=st.integers(0, 3),
    maxLength=st.integers(2, 6),
    pattern=st.sampled_from(["^[a-c]+$", "x", "^\\d{2}-\\w$", "é|🙂", '^"', "(?=a)a", "a{1,3}$"]),
    format=st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "email", "uri", "password", "file-path"]),
).map(lambda parts: {"type": "string", **parts})
_NUMBERS = st.tuples(
    st.sampled_from(["integer", "number"]),
    _parts(
        minimum=st.integers(-100, 10),
        maximum=st.integers(5, 1000),
        exclusiveMinimum=st.sampled_from([-3, 0, 0.5]),
        exclusiveMaximum=st.sampled_from([7, 50.25]),
        multipleOf=st.sampled_from([1, 2, 5, 10, 0.5]),
    ),
).map(lambda drawn: {"type": drawn[0], **drawn[1]})
_SCALARS = st.one_of(
    _STRINGS,
    _NUMBERS,
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}, {"title": "any"}]),
    _VALUES.map(lambda value: {"const": value}),
    st.lists(_VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
)


def _objects(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return _parts(
        properties=st.dictionaries(_NAMES, inner, max_size=4),
        required=st.lists(_NAMES, max_size=3, unique=True),
        additionalProperties=st.booleans() | inner,
        minProperties=st.integers(0, 2),
        maxProperties=st.integers(2, 4),
        patternProperties=st.dictionaries(st.sampled_from(["^x", "_$"]), inner, max_size=1),
        description=st.just("an object"),
    ).map(lambda parts: {"type": "object", **parts})


def _arrays(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return _parts(
        items=inner,
        prefixItems=st.lists(inner, min_size=1, max_size=2),
        minItems=st.integers(0, 2),
        maxItems=st.integers(2, 4),
        uniqueItems=st.sampled_from([False, False, False, True]),
    ).map(lambda parts: {"type": "array", **parts})


def _combined(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.tuples(
        st.sampled_from(["anyOf", "anyOf", "oneOf", "allOf"]), st.lists(inner, min_size=1, max_size=3)
    ).map(lambda drawn: {drawn[0]: drawn[1]})


def _tagged(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    """A discriminated union, as pydantic writes it."""
    return st.lists(inner, min_size=2, max_size=3).map(
        lambda values: {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": f"k{index}"}, "value": value},
                    "required": ["kind", "value"],
                }
                for index, value in enumerate(values)
            ],
            "discriminator": {"propertyName": "kind"},
        }
    )


def _with_definition(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    """A list of itself."""
    return inner.map(
        lambda schema: {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"value": schema, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                    "required": ["value", "next"],
                    "additionalProperties": False,
                }
            },
            "$ref": "#/$defs/node",
        }
    )


_VALUE_SCHEMAS = st.recursive(
    _SCALARS, lambda inner: st.one_of(_objects(inner), _arrays(inner), _combined(inner), _tagged(inner)), max_leaves=6
)
schemas = st.one_of(_objects(_VALUE_SCHEMAS), _VALUE_SCHEMAS, _with_definition(_SCALARS))
"""Roots are mostly objects, as OpenAI's have to be."""
