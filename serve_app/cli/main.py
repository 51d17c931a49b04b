"""The entry point of `serve-app`: picks the subcommand's module and turns its errors into a sentence and a status.

Imports only the module of the command that was typed, so that `serve-app chat` starts without Ray or torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from serve_app import __version__
from serve_app.cli.command_error import CommandError
from serve_app.home import ensure_home

# Each has a module with `add_arguments(parser)` and `run(arguments)`; its docstring is the description in --help.
COMMANDS = {
    "serve": "start the service from a config file, and show how far it is until it is ready",
    "stop": "stop a service that `serve-app serve` started on this machine",
    "check": "validate a config file and say what it needs, without starting anything",
    "fetch": "fetch and convert a model ahead of the first start",
    "keys": "make, list and revoke API keys",
    "models": "list the models of a running server",
    "chat": "chat with a running server in the terminal",
    "bench": "measure a running server that speaks OpenAI's API",
}
_INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: serve-app COMMAND [...]\n")
        for name, text in COMMANDS.items():
            print(f"  {name:8}{text}")
        print("\nserve-app COMMAND --help says more of one command.")
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"serve-app {__version__}")
        return 0
    if words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean `{close[0]}`?" if close else "the commands are: " + ", ".join(COMMANDS)
        print(f"serve-app: there is no command {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"serve_app.cli.{words[0]}")
    parser = argparse.ArgumentParser(prog=f"serve-app {words[0]}", description=command.__doc__)
    command.add_arguments(parser)
    try:
        _ensure_home()
        status: int = command.run(parser.parse_args(words[1:]))
        return status
    except CommandError as error:
        print(f"serve-app {words[0]}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left (`| head`). Python would complain again while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _ensure_home() -> None:
    try:
        ensure_home()
    except OSError as error:
        raise CommandError(f"this user has no home folder, and none can be made ({error}); set HOME") from error


if __name__ == "__main__":
    sys.exit(main())
