"""The file of API keys: YAML with the SHA-256 of each key, never a key itself.

Promises that a file is read whole or not at all, that every mistake in it is named with its line, and that it is
written in one step: a reader sees the old file or the new one. Only its owner can read a file that is written here.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from serve_app.yaml_lines import YamlError, parse

MAX_BYTES = 8 * 2**20
"""Largest file that is read. 10,000 keys take about 2 MB."""
LOCK_PATIENCE_S = 10.0
"""How long a command waits for another one that changes the same file."""
NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"
"""Names of keys and tenants. They stand in log lines and in labels of metrics."""

_HEAD = """\
# Keys of serve_app, written by `serve-app keys`, which leaves out other comments. It may be edited by hand: a running
# service reads it again. It holds no secret, only the SHA-256 of each key.
"""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it

Name = Annotated[str, Field(pattern=rf"^{NAME}$")]
Count = Annotated[int, Field(ge=1)]
PriorityName = Literal["interactive", "batch"]


class KeyFileError(Exception):
    """The file can't be read or written; the text says what is wrong and where."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class LimitsDocument(_Document):
    """See `access.caller.Limits`."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    tokens_per_day: Count | None = None
    streams: Count | None = None
    context_tokens: Count | None = None
    answer_tokens: Count | None = None


class TenantDocument(_Document):
    """What the keys of a tenant share."""

    weight: float = Field(default=1.0, ge=0.001, le=1000)
    limits: LimitsDocument = LimitsDocument()


class KeyDocument(_Document):
    """One key."""

    name: Name
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the key, in lower-case hexadecimal."""
    tenant: Name | None = None
    """None: one of its own, with the key's name."""
    admin: bool = False
    models: Annotated[list[str], Field(min_length=1)] | None = None
    """None: all."""
    priorities: Annotated[list[PriorityName], Field(min_length=1)] | None = None
    """None: all."""
    limits: LimitsDocument = LimitsDocument()
    expires: AwareDatetime | None = None
    created: AwareDatetime | None = None


class KeyFile(_Document):
    """The whole file."""

    tenants: dict[Name, TenantDocument] = {}
    keys: list[KeyDocument] = []


def read_key_file(path: Path) -> KeyFile:
    """Raises `KeyFileError`."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe must not hold up the start
            found = os.fstat(file.fileno())
            content = file.read(MAX_BYTES + 1) if stat.S_ISREG(found.st_mode) else None
    except FileNotFoundError:
        raise KeyFileError(f"there is no file {path}; `serve-app keys create NAME --file {path}` makes it") from None
    except OSError as error:
        raise KeyFileError(f"{path} can't be read: {error.strerror}") from error
    if content is None:
        raise KeyFileError(f"{path} is no regular file")
    if len(content) > MAX_BYTES:
        raise KeyFileError(f"{path} is larger than {MAX_BYTES} bytes")
    if found.st_mode & stat.S_IWOTH:
        raise KeyFileError(f"{path} can be written by every user of this machine; run `chmod o-w {path}`")
    return parse_key_file(content, path)


def parse_key_file(content: bytes, path: Path) -> KeyFile:
    """`path`: for messages. Raises `KeyFileError`, which names every mistake."""
    try:
        document = parse(content.decode(), _LOADER)
        file = KeyFile.model_validate({} if document.data is None else document.data)
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except YamlError as error:
        raise KeyFileError(f"{_place(path, error.line)}: {error}") from error
    except ValidationError as invalid:
        problems = [
            f"{_place(path, document.line_of(error['loc']))}: {_field(error['loc'])}{_message(error)}"
            for error in invalid.errors(include_url=False, include_input=False)
        ]
        raise KeyFileError("\n".join(problems)) from None  # the cause would show the file's contents
    seen: dict[str, int] = {}
    for index, key in enumerate(file.keys):
        for kind, value in (("name", key.name), ("sha256", key.sha256)):
            if (other := seen.setdefault(f"{kind} {value}", index)) != index:
                line = document.line_of(("keys", index, kind))
                raise KeyFileError(f"{_place(path, line)}: keys[{index}] has the {kind} of keys[{other}]")
    return file


def _place(path: Path, line: int | None) -> str:
    return f"{path}:{line}" if line is not None else str(path)


def _field(location: tuple[int | str, ...]) -> str:
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return f"{name}: " if name else ""


def _message(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "there is no such field"
    last = error["loc"][-1] if error["loc"] else ""
    if last == "sha256" and error["type"] == "string_pattern_mismatch":
        return "must be the SHA-256 of a key, 64 hexadecimal digits; `serve-app keys create` writes it"
    if error["type"] == "string_pattern_mismatch":
        return "must be a name of letters, digits and . _ @ -, at most 64 of them"
    if error["type"] in ("timezone_aware", "datetime_type"):
        return "must be a time with its zone, as 2027-01-31T00:00:00Z"
    return str(error["msg"])


@contextmanager
def changing(path: Path) -> Iterator[tuple[KeyFile, list[KeyFile]]]:
    """The file as it is (empty where there is none), and a list: what the block appends to it last is written.

    Other commands wait meanwhile. Raises `KeyFileError`.
    """
    path = path.resolve()  # the file itself is replaced, not a link to it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(f"{path}.lock", timeout=LOCK_PATIENCE_S, mode=0o600).acquire()
    except Timeout as error:
        raise KeyFileError(f"another command changes {path}; try again when it has ended") from error
    except OSError as error:
        raise KeyFileError(f"{path} can't be written: {error.strerror}") from error
    with held:
        changed: list[KeyFile] = []
        yield read_key_file(path) if path.exists() else KeyFile(), changed
        if changed:
            try:
                _write(path, changed[-1])
            except OSError as error:
                raise KeyFileError(f"{path} can't be written: {error.strerror}") from error


def _write(path: Path, file: KeyFile) -> None:
    """Replace the file in one step. Raises OSError."""
    text = _HEAD + yaml.safe_dump(_plain(file), sort_keys=False, allow_unicode=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # its mode is 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as output:
            output.write(text)
            output.flush()
            os.fsync(output.fileno())
            with contextlib.suppress(FileNotFoundError, PermissionError):  # root changes the file of another user
                before = path.stat()
                os.fchown(output.fileno(), before.st_uid, before.st_gid)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _plain(file: KeyFile) -> dict[str, Any]:
    document = file.model_dump(exclude_defaults=True)
    document.setdefault("keys", [])
    return document


def now() -> datetime:
    """The time, to the second, as the file has it."""
    return datetime.now(UTC).replace(microsecond=0)
