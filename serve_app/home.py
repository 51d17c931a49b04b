"""Where this user's folders are, also for users without a home: a container may run as a user id without an account.

Imports nothing else of serve_app but `private_files`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from serve_app.private_files import make_private_folder


def home() -> Path:
    """The user's home; if none is known, a private folder of this user in the temporary directory.

    Raises OSError when that folder belongs to another user or can't be made.
    """
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and no entry in the users' table
        folder = Path(tempfile.gettempdir()) / f"serve_app-{os.geteuid()}"
        make_private_folder(folder)
        return folder


def ensure_home() -> None:
    """Set HOME where no home is known, for the libraries and the programs that look there. Raises as `home` does."""
    os.environ.setdefault("HOME", str(home()))


def user_folder(named: str | None, xdg: str, usual: str) -> Path:
    """The folder for one kind of file: `named` if it is given, else $`xdg`/serve_app, else ~/`usual`/serve_app.

    Raises OSError as `home` does.
    """
    if named:
        return expanded(named)
    if base := os.environ.get(xdg):
        return expanded(base) / "serve_app"
    return home() / usual / "serve_app"


def expanded(text: str) -> Path:
    """The path with a leading `~` or `~user` replaced; unchanged if that user isn't known."""
    head, _, rest = text.partition("/")
    if head == "~":
        return home() / rest
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)
