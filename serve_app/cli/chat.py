"""Chat with a running server in the terminal. Ctrl-C ends the answer that is being written; at the prompt, Ctrl-C twice
or Ctrl-D leaves. With a pipe on standard input each line is a message, and only the answers are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import signal
import sys
import unicodedata

from serve_app.cli.command_error import CommandError
from serve_app.cli.progress import ProgressLine
from serve_app.client import (
    APIError,
    AuthenticationError,
    Client,
    ConnectionLost,
    Message,
    Options,
    Readiness,
    ServeAppError,
)
from serve_app.client.protocol import DEFAULT_URL, GRPC_SCHEMES, KEY_VARIABLE
from serve_app.core import LoadStage

HELP = """\
/reset          forget the conversation, keep the system text
/system TEXT    set the system text and forget the conversation; without TEXT, show it
/help           this
/exit           leave (or Ctrl-D)
Ctrl-C ends an answer. A line that ends in \\ goes on in the next one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--url", default=DEFAULT_URL, help=f"the server (default: {DEFAULT_URL}; gRPC: grpc://HOST:PORT)"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system text")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: the model's own")
    parser.add_argument("--max-tokens", type=int, help="longest answer in tokens; default: the server's")
    parser.add_argument("--seed", type=int, help="same conversation, same seed, same answer")
    parser.add_argument("--once", metavar="PROMPT", help="ask this, print the answer, and leave")
    parser.add_argument("--wait", type=float, default=600.0, metavar="S", help="seconds to wait for a loading model")


def run(arguments: argparse.Namespace) -> int:
    """Chat until the input ends."""
    options = Options(temperature=arguments.temperature, max_tokens=arguments.max_tokens, seed=arguments.seed)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # pasted bytes that can't be decoded must not end the program
    try:
        client = Client(arguments.url)
    except ValueError as error:
        raise CommandError(str(error), status=2) from error
    with client:
        name = _wait_for_model(client, arguments.url, arguments.wait)
        conversation = Conversation(client, options, arguments.system)
        if arguments.once is not None:
            return 0 if conversation.ask(arguments.once) else 1
        if not sys.stdin.isatty():
            return _answer_lines(conversation)
        print(f"Chatting with {name} at {arguments.url}. /help lists the commands; Ctrl-D leaves.")
        _talk(conversation)
    return 0


class Conversation:
    """The turns so far. An answer that was cut short is kept as far as it came."""

    def __init__(self, client: Client, options: Options, system: str | None) -> None:
        self._client = client
        self._options = options
        self._turns: list[Message] = []
        self.system = system

    def reset(self) -> None:
        """Forget the turns."""
        self._turns.clear()

    def ask(self, text: str) -> bool:
        """Print the answer as it comes. False when it failed; a question without any answer is forgotten.

        Raises KeyboardInterrupt when the user ends the answer.
        """
        question = Message(role="user", content=text)
        system = [Message(role="system", content=self.system)] if self.system else []
        pieces: list[str] = []
        with self._client.stream(messages=[*system, *self._turns, question], **self._options) as stream:
            try:
                for document in stream:
                    pieces.append(document.generated_text)
                    sys.stdout.write(printable(document.generated_text))
                    sys.stdout.flush()
            except ServeAppError as error:
                print(f"\n{_advice(error)}" if pieces else _advice(error), file=sys.stderr)
                return False
            finally:
                if pieces:
                    self._turns += [question, Message(role="assistant", content="".join(pieces))]
        sys.stdout.write("\n")
        sys.stdout.flush()
        if stream.done is not None and stream.done.finish_reason == "length":
            print("[cut at the limit of tokens; --max-tokens sets it]", file=sys.stderr)
        return True


def printable(text: str) -> str:
    """Text for a terminal: a model could write escape sequences, and a terminal would obey them."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")


def _wait_for_model(client: Client, url: str, timeout_s: float) -> str:
    """The model's name, once it can answer."""
    with ProgressLine() as line:

        def show(state: Readiness) -> None:
            if not state.ready:
                line.show(LoadStage(f"waiting for the model ({state.stage or 'starting'})", state.fraction))

        try:
            client.wait_until_ready(timeout_s, progress=show)
            if url.startswith(GRPC_SCHEMES):
                return "the model"  # gRPC has no call that names it
            return ", ".join(model.id for model in client.models())
        except ServeAppError as error:
            raise CommandError(_advice(error)) from error


def _advice(error: ServeAppError) -> str:
    if isinstance(error, ConnectionLost) and "no server answers" in str(error):
        return f"{error}; start one with `serve-app serve CONFIG`, or name another with --url"
    if isinstance(error, AuthenticationError):
        return f"{error.message} This command takes the key from the environment variable {KEY_VARIABLE}."
    return error.message if isinstance(error, APIError) else str(error)


def _answer_lines(conversation: Conversation) -> int:
    """Answer each line of a pipe. Status 1 when one of them got no answer."""
    status = 0
    for line in sys.stdin:
        text = line.strip()
        if text == "/exit":
            break
        if text and not _command(text, conversation) and not conversation.ask(text):
            status = 1
    return status


def _talk(conversation: Conversation) -> None:
    """Prompt, answer, repeat."""
    # A program inherits an ignored SIGINT from a script's background job, or from a terminal that such a job opened.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(ImportError):  # some builds of Python lack it
        import readline  # noqa: F401  (its import is what gives input() editing and history)
    interrupted = False
    while True:
        try:
            text = _read_message()
        except EOFError:
            _leave()
            return
        except KeyboardInterrupt:
            if interrupted:
                _leave()
                return
            interrupted = True
            print("\n(Ctrl-C again, or Ctrl-D, leaves)")
            continue
        interrupted = False
        if text == "/exit":
            _ignore_ctrl_c()
            return
        if not text or _command(text, conversation):
            continue
        if re.fullmatch(r"/[a-z]+", text):
            print(f"there is no command {text}; /help lists them")
            continue
        try:
            conversation.ask(text)
        except KeyboardInterrupt:
            interrupted = True
            print(" [ended]")


def _leave() -> None:
    _ignore_ctrl_c()
    print()


def _ignore_ctrl_c() -> None:
    """The chat ends by itself now; one more Ctrl-C would only turn that into a failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read_message() -> str:
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines).strip()


def _command(text: str, conversation: Conversation) -> bool:
    """Carry out a command; False for text that is not a command."""
    name, _, rest = text.partition(" ")
    if name == "/system" and rest.strip():
        conversation.system = rest.strip()
        conversation.reset()
        print("(system text set, conversation forgotten)", file=sys.stderr)
    elif text == "/system":
        print(conversation.system or "(no system text)", file=sys.stderr)
    elif text == "/reset":
        conversation.reset()
        print("(forgotten)", file=sys.stderr)
    elif text == "/help":
        print(HELP, file=sys.stderr)
    else:
        return False
    return True
