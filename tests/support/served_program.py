"""`serve-app serve` with a stand-in for `serve run`, and no model to fetch."""

from __future__ import annotations

import pwd
import sys

import fake_serve_run

from serve_app.cli import serve
from serve_app.cli.main import main


def serve_app(arguments: list[str]) -> int:
    """Its exit status. It looks often for what the stand-in does."""
    serve.SERVE_RUN = (sys.executable, fake_serve_run.__file__, "run")
    serve._fetch_models = lambda file: sys.stdout.write("fetching\n")
    serve._POLL_S = 0.02
    return main(arguments)


def serve_app_without_user(arguments: list[str]) -> int:
    """The same, where the system does not know the user's name."""
    pwd.getpwuid = {}.__getitem__  # type: ignore[assignment]
    return serve_app(arguments)
