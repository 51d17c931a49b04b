"""llama.cpp's grammars (GBNF) as Lark grammars.

Promises a time that grows with the length of the text alone, and the same language. The syntax is that of
https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md. Knows no tokens: `<[id]>` is not taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\r\n]*)
      | (?P<head>[A-Za-z0-9_-]+)[ \t]*::=
      | (?P<name>[A-Za-z0-9_-]+)
      | (?P<literal>"(?:[^"\\]|\\.)*")
      | (?P<set>\[(?:[^\]\\]|\\.)*\])
      | (?P<times>[*+?]|\{[ ]*\d+[ ]*(?:,[ ]*\d*[ ]*)?\})
      | (?P<mark>[|().])
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)|(.)", re.DOTALL)
_LETTERS = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "[": "[", "]": "]", "-": "-", "^": "^", "/": "/"}
_ROOT = "root"


class GbnfError(ValueError):
    """Text that is no such grammar. The message is one sentence without a full stop."""


@dataclass(slots=True)
class _Rule:
    pieces: list[str | tuple[str]] = field(default_factory=list)
    """Lark text, and names of rules in tuples."""
    used_by: list[str] = field(default_factory=list)
    waits_for: int = 0
    """References to rules that are not known to be terminals."""


def is_lark(text: str) -> bool:
    """Whether a grammar is written in Lark's syntax and not in llama.cpp's."""
    return re.search(r"^[ \t]*(?:%llguidance\b|start(?:\[[^\]\n]*\])?\s*:(?!:=))", text, re.MULTILINE) is not None


def gbnf_to_lark(text: str) -> str:
    """The same language in Lark's syntax. Raises `GbnfError`."""
    rules = _rules(text)
    if _ROOT not in rules:
        raise GbnfError("a rule named root is missing")
    names = _lark_names(rules)
    lines = []
    for name, rule in rules.items():
        body = " ".join(piece if isinstance(piece, str) else names[piece[0]] for piece in rule.pieces)
        lines.append(f"{names[name]}: {body}")
    return "\n".join(lines)


def _rules(text: str) -> dict[str, _Rule]:
    rules: dict[str, _Rule] = {}
    pieces: list[str | tuple[str]] | None = None
    for kind, value, position in _tokens(text):
        try:
            if kind == "head":
                if value in rules:
                    raise GbnfError(f"the rule {value[:50]} is defined twice")
                pieces = rules.setdefault(value, _Rule()).pieces
            elif pieces is None:
                raise GbnfError("a rule is expected")
            elif kind == "name":
                pieces.append((value,))
            elif kind == "times":
                _repeat(pieces, value)
            else:
                pieces.append(_lark_piece(kind, value))
        except GbnfError as error:
            raise GbnfError(f"{error} in line {_line(text, position)}") from None
    return rules


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            shown = text[position : position + 20].split("\n")[0]
            raise GbnfError(f"{shown!r} can't be read in line {_line(text, position)}")
        if match.lastgroup != "space":
            yield match.lastgroup, match[match.lastgroup], position
        position = match.end()


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _lark_piece(kind: str, value: str) -> str:
    if kind == "literal":
        return json.dumps("".join(_characters(value[1:-1])), ensure_ascii=False)
    if kind == "set":
        return _set(value[1:-1])
    return r"/(?s:.)/" if value == "." else value


def _set(body: str) -> str:
    """A set of characters as a regex."""
    negated = body.startswith("^")
    characters = list(_ESCAPE.finditer(body[negated:]))
    parts = ["[^" if negated else "["]
    for index, match in enumerate(characters):
        character = _character(match)
        is_range = match[2] == "-" and 0 < index < len(characters) - 1
        parts.append("-" if is_range else _in_regex(character))
    if len(parts) == 1:
        raise GbnfError("a set of characters is empty")
    return f"/{''.join(parts)}]/"


def _in_regex(character: str) -> str:
    return character if character.isalnum() and character.isascii() else f"\\u{{{ord(character):x}}}"


def _characters(body: str) -> Iterator[str]:
    return (_character(match) for match in _ESCAPE.finditer(body))


def _character(match: re.Match[str]) -> str:
    escaped, plain = match[1], match[2]
    if plain is not None:
        return plain
    if len(escaped) > 1:
        code = int(escaped[1:], 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise GbnfError(f"\\{escaped} is no character")
        return chr(code)
    if escaped not in _LETTERS:
        raise GbnfError(f"the escape \\{escaped} is unknown")
    return _LETTERS[escaped]


def _repeat(pieces: list[str | tuple[str]], times: str) -> None:
    """Let the last piece repeat. A set of characters repeats inside its regex, which is read much faster."""
    last = pieces[-1] if pieces else "|"
    if isinstance(last, tuple):
        pieces.append(times)
    elif last in ("|", "(") or last[-1] in "*+?}":
        raise GbnfError(f"{times} repeats nothing")
    elif last.startswith("/"):
        pieces[-1] = f"{last[:-1]}{times.replace(' ', '')}/"
    else:
        pieces.append(times)


def _lark_names(rules: dict[str, _Rule]) -> dict[str, str]:
    """Lark's names of the rules. Terminals, which are read as one, have upper case: rules of other terminals alone."""
    for name, rule in rules.items():
        for piece in rule.pieces:
            if isinstance(piece, tuple):
                if piece[0] not in rules:
                    raise GbnfError(f"the rule {piece[0][:50]} is missing")
                rules[piece[0]].used_by.append(name)
                rule.waits_for += 1
    ready = [name for name, rule in rules.items() if not rule.waits_for and name != _ROOT]
    terminals: set[str] = set()
    while ready:
        terminals.add(name := ready.pop())
        for user in rules[name].used_by:
            rules[user].waits_for -= 1
            if not rules[user].waits_for and user != _ROOT:
                ready.append(user)
    numbers = {name: index for index, name in enumerate(rules)}
    named = {name: f"T{numbers[name]}" if name in terminals else f"r{numbers[name]}" for name in rules}
    return named | {_ROOT: "start"}
