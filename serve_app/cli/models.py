"""List the models of a running server."""

from __future__ import annotations

import argparse
import json

from serve_app.cli.command_error import CommandError
from serve_app.client import AuthenticationError, Client, ServeAppError
from serve_app.client.protocol import DEFAULT_URL, KEY_VARIABLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the server (default: {DEFAULT_URL})")
    parser.add_argument("--json", action="store_true", help="everything the server says, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print a line per model."""
    try:
        with Client(arguments.url) as client:
            found = client.models()
    except ValueError as error:
        raise CommandError(str(error), status=2) from error
    except AuthenticationError as error:
        raise CommandError(f"{error.message} Put the key into the environment variable {KEY_VARIABLE}.") from error
    except ServeAppError as error:
        raise CommandError(f"{error}; is it running? `serve-app serve CONFIG` starts one") from error
    if arguments.json:
        print(json.dumps([dict(model.details) for model in found], indent=2))
        return 0
    for model in found:
        print(model.id)
    return 0
