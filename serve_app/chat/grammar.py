"""Grammars of answers, in the form of `GenerationRequest.constraint`: made from what callers give.

Promises that whatever matches the grammar of a schema validates against the schema, and that equal arguments give equal
texts. Whether a grammar can be used is not known here: see `grammar_checker`. Knows no wire format and no tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import regex_to_lark

from serve_app.chat.gbnf import GbnfError, gbnf_to_lark, is_lark
from serve_app.chat.schemas import checked_schema
from serve_app.chat.unicode import shown

JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": 'nrbtf\\"',
}
"""How JSON is written: at most one space, after a comma or a colon. Free whitespace lets a small model write spaces
until its limit. Characters stand for themselves: with `\\u` escapes a model could write the name of a property in a
second way, past its schema, or half a character."""
_UNSUPPORTED_OPTION = re.compile(r"^[a-z_][\w-]*\[[^\]\n]*\b(max_tokens|temperature|stop)\s*=", re.MULTILINE)

_LARK_WORDS = re.compile(r""""(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\])+/|(?P<token><[^<>\n]+>)""", re.DOTALL)
"""Texts, comments and regular expressions of Lark's syntax, in which no token is named; and names of tokens."""


class GrammarTextError(ValueError):
    """A grammar that can't be made. The message is one sentence without a full stop."""


def styled_schema(schema: Mapping[str, Any] | bool) -> dict[str, Any]:
    """A JSON Schema as llguidance takes it, with how the JSON is written. Raises `SchemaError`."""
    return {**checked_schema(schema), "x-guidance": JSON_STYLE}


def json_schema_grammar(schema: Mapping[str, Any] | bool) -> str:
    """JSON that validates against the schema, which is `json.loads`'s of a JSON Schema. Raises `GrammarTextError`."""
    try:
        return _of({"json_schema": styled_schema(schema)})
    except (ValueError, RecursionError) as error:  # NaN, or nested too deeply to be written
        raise GrammarTextError(str(error)) from error


def json_object_grammar() -> str:
    """Any JSON object."""
    return json_schema_grammar({"type": "object"})


def regex_grammar(regex: str) -> str:
    """Text that a regular expression matches as a whole, in the syntax of Rust's `regex`.

    `\\d` and `\\w` are ASCII, as in JavaScript. Raises `GrammarTextError`.
    """
    try:
        return _of({"lark_grammar": f"start: /{regex_to_lark(regex, 'dw')}/" if regex else 'start: ""'})
    except ValueError as error:  # half a character
        raise GrammarTextError(str(error)) from error


def choice_grammar(choices: Sequence[str]) -> str:
    """One of these texts."""
    texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return _of({"lark_grammar": f"start: CHOICE\nCHOICE: {texts}"})


def lark_grammar(grammar: str) -> str:
    """Text that matches a Lark grammar, as llguidance reads it: the rule is `start`. Raises `GrammarTextError`.

    The grammar may name no tokens: an answer with control tokens would not be its text.

    Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
    """
    if (found := _UNSUPPORTED_OPTION.search(grammar)) is not None:
        raise GrammarTextError(f"the option '{found[1]}' of a rule is not supported")
    if found := next((found for found in _LARK_WORDS.finditer(grammar) if found["token"]), None):
        raise GrammarTextError(f"the token {shown(found[0])} can't be named: write its text in quotes")
    return _of({"lark_grammar": grammar})


def ebnf_grammar(grammar: str) -> str:
    """Text that matches a grammar in Lark's syntax or in llama.cpp's (GBNF). Raises `GrammarTextError`."""
    try:
        return lark_grammar(grammar if is_lark(grammar) else gbnf_to_lark(grammar))
    except GbnfError as error:
        raise GrammarTextError(str(error)) from error


def _of(part: Mapping[str, Any]) -> str:
    return json.dumps({"grammars": [part]}, allow_nan=False, separators=(",", ":"))
