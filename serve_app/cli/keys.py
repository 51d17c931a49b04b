"""Make, list and revoke API keys in the file that a config names in `auth.keys_file`. A running service reads the file
again when it has changed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from serve_app.access.key_file import (
    NAME,
    KeyDocument,
    KeyFile,
    KeyFileError,
    LimitsDocument,
    changing,
    now,
    read_key_file,
)
from serve_app.access.keys import digest_of, new_key
from serve_app.cli.command_error import CommandError
from serve_app.core import Priority
from serve_app.home import expanded

_AGE = re.compile(r"([0-9]{1,5})([dhm])")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="create|list|revoke")
    create = actions.add_parser("create", help="make a key, and print it once")
    create.add_argument("name", help="the key's name, which stands in logs and metrics")
    create.add_argument("--tenant", help="who shares streams, cached prefixes and limits (default: the key's name)")
    create.add_argument("--model", action="append", metavar="NAME", help="may use this model only; may be repeated")
    create.add_argument(
        "--priority", action="append", choices=[str(one) for one in Priority], help="may ask for this class only"
    )
    create.add_argument("--admin", action="store_true", help="/ready shows it how the keys are")
    create.add_argument("--expires", metavar="WHEN", help="a time with its zone (2027-01-31T00:00Z), or 90d, 12h, 30m")
    for name in LimitsDocument.model_fields:
        create.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"limit of {_said(name)}")
    listing = actions.add_parser("list", help="show the keys, which are not shown themselves")
    revoke = actions.add_parser("revoke", help="take a key away")
    revoke.add_argument("name")
    for action in (create, listing, revoke):
        place = action.add_mutually_exclusive_group(required=True)
        place.add_argument("--file", metavar="PATH", help="the file of keys")
        place.add_argument("--config", metavar="PATH", help="the config that names it in auth.keys_file")


def run(arguments: argparse.Namespace) -> int:
    """Carry out one of the three."""
    path = _path(arguments)
    try:
        if arguments.action == "create":
            _create(path, arguments)
        elif arguments.action == "revoke":
            _revoke(path, arguments.name)
        else:
            _list(read_key_file(path))
    except KeyFileError as error:
        raise CommandError(str(error)) from error
    return 0


def _path(arguments: argparse.Namespace) -> Path:
    if arguments.file is not None:
        return expanded(arguments.file)
    from serve_app.cli.config_file import load  # imports Serve's schema, which takes a second

    named = {app.config.auth.keys_file for app in load(Path(arguments.config)).apps}
    if len(named) != 1 or None in named:
        many = "several files of keys" if len(named) > 1 else "no file of keys in auth.keys_file"
        raise CommandError(f"{arguments.config} names {many}; give it with --file", status=2)
    return expanded(named.pop() or "")


def _create(path: Path, arguments: argparse.Namespace) -> None:
    key = new_key()
    limits = {name: value for name in LimitsDocument.model_fields if (value := getattr(arguments, name)) is not None}
    _check_name(arguments.name, "name")
    if arguments.tenant is not None:
        _check_name(arguments.tenant, "tenant")
    try:
        document = KeyDocument(
            name=arguments.name,
            sha256=digest_of(key).hex(),
            tenant=arguments.tenant,
            admin=arguments.admin,
            models=arguments.model,
            priorities=arguments.priority,
            limits=LimitsDocument(**limits),
            expires=None if arguments.expires is None else _time(arguments.expires),
            created=now(),
        )
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
        option = f"--{str(error['loc'][-1]).replace('_', '-')}"
        raise CommandError(f"{option}: {error['msg']}", status=2) from None
    with changing(path) as (file, changed):
        if any(other.name == document.name for other in file.keys):
            raise CommandError(f"{path} has a key {document.name} already; revoke it first, or take another name")
        changed.append(file.model_copy(update={"keys": [*file.keys, document]}))
    print(key)
    _note(f"This is the key of {document.name}; it can't be shown again. {path} holds only its SHA-256.")


def _revoke(path: Path, name: str) -> None:
    with changing(path) as (file, changed):
        left = [key for key in file.keys if key.name != name]
        if len(left) == len(file.keys):
            known = ", ".join(key.name for key in file.keys) or "none"
            raise CommandError(f"{path} has no key {name} (its keys: {known})")
        changed.append(file.model_copy(update={"keys": left}))
    _note(f"The key of {name} is revoked: a running service refuses it within seconds.")


def _list(file: KeyFile) -> None:
    rows = [("NAME", "TENANT", "CREATED", "EXPIRES", "MAY")]
    for key in file.keys:
        expires = "never" if key.expires is None else _day(key.expires)
        if key.expires is not None and key.expires <= datetime.now(UTC):
            expires += " (expired)"
        created = "-" if key.created is None else _day(key.created)
        rows.append((key.name, key.tenant or key.name, created, expires, _rights(key)))
    _table(rows)


def _rights(key: KeyDocument) -> str:
    parts = ["admin"] if key.admin else []
    parts += [] if key.models is None else [f"models: {', '.join(key.models)}"]
    parts += [] if key.priorities is None else [f"priorities: {', '.join(key.priorities)}"]
    parts += [f"{_said(name)}: {limit}" for name, limit in key.limits.model_dump(exclude_none=True).items()]
    return "; ".join(parts) or "everything"


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _said(name: str) -> str:
    return name.replace("_", " ").replace(" per ", " a ")


def _day(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%MZ")


def _check_name(name: str, what: str) -> None:
    if not re.fullmatch(NAME, name):
        raise CommandError(f"{what} {name!r} must be letters, digits and . _ @ -, at most 64 of them", status=2)


def _time(text: str) -> datetime:
    """A moment from `90d`, or from a time in ISO 8601 with its zone. Raises `CommandError`."""
    if age := _AGE.fullmatch(text):
        return now() + timedelta(**{_UNITS[age[2]]: int(age[1])})
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = datetime.max
    if time.tzinfo is None:
        raise CommandError(f"--expires {text!r} is no time; write 2027-01-31T00:00Z, or 90d, 12h, 30m", status=2)
    return time


def _note(text: str) -> None:
    """For people; not on standard output, where a script reads the key."""
    print(text, file=sys.stderr)
