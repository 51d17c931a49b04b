"""YAML with the line of every key, and with keys that are given twice refused (PyYAML keeps the last silently).

Knows YAML and nothing of what the document means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Where a value stands in a document: mapping keys and list positions from the top."""


class YamlError(Exception):
    """The text is no YAML, or has a key twice."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.line = line
        """The line, from 1; None when the parser did not say."""


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed text."""

    data: Any
    lines: dict[Path, int]
    """The line, from 1, of each key and list item."""

    def line_of(self, path: Path) -> int | None:
        """The line of the value at `path`, or of the innermost list or mapping around it that has one."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None


def parse(text: str, loader: Any = yaml.SafeLoader) -> Document:
    """Raises YamlError. `loader`: one of PyYAML's safe ones."""
    lines: dict[Path, int] = {}
    try:
        root = yaml.compose(text, Loader=loader)
        if root is not None:
            _collect(root, (), lines, frozenset())
        return Document(yaml.load(text, Loader=loader), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(f"not YAML: {message}", mark.line + 1 if mark else None) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Characters that YAML forbids; a date like 2024-13-45; a thousand nested brackets.
        raise YamlError(f"not YAML: {error}", None) from error


def _collect(node: yaml.Node, path: Path, lines: dict[Path, int], around: frozenset[int]) -> None:
    """Note the lines below `node`. `around` holds the ids of the nodes that contain it, so that a cycle is detected."""
    if id(node) in around:
        raise YamlError("an anchor contains itself", node.start_mark.line + 1)
    around |= {id(node)}
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect(item, (*path, index), lines, around)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no field has a list or mapping for a name; loading the document refuses it
            line = key.start_mark.line + 1
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise YamlError(f"`{key.value}` is given twice", line)
            seen.add(key.value)
            lines[*path, key.value] = line
            _collect(value, (*path, key.value), lines, around)
