"""Writes the blocking client from the asynchronous one: `python scripts/unasync.py`.

Replaces words line by line, as httpcore's script of this name does, and lets ruff arrange what became shorter.
`tests/client/test_synchronous.py` fails when a file in the repository is another.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).parents[1] / "serve_app" / "client"
TWINS = {source: CLIENT / source.name.removeprefix("a") for source in sorted(CLIENT.glob("asynchronous*.py"))}
"""Asynchronous module -> blocking module."""

NOTICE = "# Made from a{target} by scripts/unasync.py: change that file, then run `make client`.\n"
REPLACEMENTS = (
    # what only one of the two has to say
    (r"The asynchronous client", "The blocking client"),
    (r"asynchronous_(http|grpc)", r"synchronous_\1"),
    (r"Closing a stream, or cancelling its task,", "Closing or dropping a stream"),
    (r"for the tasks of one event loop\.", "which threads may share; each stream belongs to one thread."),
    # language and libraries
    (r"async (def|for|with) ", r"\1 "),
    (r"await ", ""),
    (r"__a(enter|exit|next)__", r"__\1__"),
    (r"StopAsyncIteration", "StopIteration"),
    (r"Async(Client|Generator|Grpc|Http|Iterator|Stream)", r"\1"),
    (r"AsyncBaseTransport", "BaseTransport"),
    (r"\ba(close|closing|iter_sse|read)\b", r"\1"),
    (r"\basyncio\b", "time"),
    (r"^import grpc\.aio$", ""),
    (r"grpc\.aio\.", "grpc."),
)


def blocking(source: str, target: Path) -> str:
    """The blocking module that `source`, the asynchronous one, stands for. Raises CalledProcessError as ruff does."""
    for pattern, replacement in REPLACEMENTS:
        source = re.sub(pattern, replacement, source, flags=re.MULTILINE)
    for command in (["check", "--quiet", "--fix", "--unsafe-fixes", "--select", "I,C416,UP028"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(target), "-"]
        source = subprocess.run(ruff, input=source, capture_output=True, text=True, check=True).stdout
    return NOTICE.format(target=target.name) + source


if __name__ == "__main__":
    for source, target in TWINS.items():
        target.write_text(blocking(source.read_text(encoding="utf-8"), target), encoding="utf-8")
