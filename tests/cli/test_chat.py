"""The terminal chat: through a pipe, and in a real terminal (a pty) with real Ctrl-C."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from fake_api import Exchange, FakeApi, say

from serve_app.cli.chat import printable

PROGRAM = "import sys; from serve_app.cli.main import main; sys.exit(main(sys.argv[1:]))"


def chat(api: FakeApi, *arguments: str, pipe: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", PROGRAM, "chat", "--url", api.url, *arguments]
    return subprocess.run(command, input=pipe, capture_output=True, timeout=30, check=False)


def messages_of(api: FakeApi) -> list[list[tuple[str, str]]]:
    return [[(turn["role"], turn["content"]) for turn in asked.json["messages"]] for asked in api.asked("/stream")]


def test_once(api: FakeApi) -> None:
    done = chat(api, "--once", "Hi", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "9", "--seed", "4")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hello there.\n", b"")
    assert api.asked("/stream")[0].json == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "temperature": 0.0,
        "max_tokens": 9,
        "seed": 4,
    }


def test_a_pipe_is_a_conversation(api: FakeApi) -> None:
    done = chat(api, pipe=b"one\n\n  two \n/usr/bin is what?\n/reset\nthree\n/exit\nfour\n")
    assert done.stdout == b"Hello there.\n" * 4
    answer = ("assistant", "Hello there.")
    assert messages_of(api) == [
        [("user", "one")],
        [("user", "one"), answer, ("user", "two")],
        [("user", "one"), answer, ("user", "two"), answer, ("user", "/usr/bin is what?")],
        [("user", "three")],
    ]


def test_a_pipe_sets_the_system_text(api: FakeApi) -> None:
    done = chat(api, pipe=b"/system Be kind.\nHi\n/system\n/help\n")
    assert messages_of(api) == [[("system", "Be kind."), ("user", "Hi")]]
    assert done.stdout == b"Hello there.\n"
    assert b"Be kind." in done.stderr
    assert b"/reset" in done.stderr


def test_bytes_that_are_no_text(api: FakeApi) -> None:
    assert chat(api, pipe=b"caf\xe9\n").returncode == 0
    assert messages_of(api) == [[("user", "caf\ufffd")]]


def test_no_server(api: FakeApi) -> None:
    api.url = "http://127.0.0.1:1"
    done = chat(api, "--once", "Hi")
    assert done.returncode == 1
    assert b"no server answers at http://127.0.0.1:1" in done.stderr
    assert b"serve-app serve CONFIG" in done.stderr


def test_a_loading_model_is_waited_for(api: FakeApi) -> None:
    stages = [{"stage": "fetching weights", "fraction": 0.25}, {"stage": "loading weights", "fraction": None}]

    def ready(exchange: Exchange) -> None:
        exchange.answer(503, stages.pop(0)) if stages else exchange.answer(200, {"status": "ready"})

    api.routes["/ready"] = ready
    done = chat(api, "--once", "Hi")
    assert done.stdout == b"Hello there.\n"
    assert b"waiting for the model (fetching weights): 25%" in done.stderr
    assert b"waiting for the model (loading weights)" in done.stderr


def test_a_model_that_failed_to_load(api: FakeApi) -> None:
    body = {"stage": "failed", "fraction": None, "error": "There is no folder /models/x."}
    api.routes["/ready"] = lambda exchange: exchange.answer(503, body)
    done = chat(api, "--once", "Hi")
    assert done.returncode == 1
    assert b"There is no folder /models/x." in done.stderr


def test_a_refusal_is_said_and_forgotten(api: FakeApi) -> None:
    def stream(exchange: Exchange) -> None:
        if exchange.json["messages"][-1]["content"] == "bad":
            exchange.refuse(400, "invalid_request", "Not that.")
        else:
            say("ok")(exchange)

    api.routes["/stream"] = stream
    done = chat(api, pipe=b"bad\ngood\n")
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == (b"ok\n", b"Not that.\n")
    assert messages_of(api)[-1] == [("user", "good")]


def test_trouble_in_the_middle_keeps_what_came(api: FakeApi) -> None:
    def stream(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.token(1, "half")
        exchange.write(b'event: error\ndata: {"error": {"message": "The engine failed."}}\n\n')
        exchange.end_stream()

    api.routes["/stream"] = stream
    done = chat(api, "--once", "Hi")
    assert done.returncode == 1
    assert done.stdout == b"half"
    assert b"The engine failed." in done.stderr


def test_an_answer_that_was_cut_is_said(api: FakeApi) -> None:
    def stream(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.token(1, "half")
        exchange.done(1, finish_reason="length")
        exchange.end_stream()

    api.routes["/stream"] = stream
    assert b"--max-tokens" in chat(api, "--once", "Hi").stderr


def test_no_escape_sequence_reaches_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\x9bc\n\td\r\x00é\u200d🙂") == "a[31mbc\n\tdé\u200d🙂"


class Terminal:
    """A chat in a pty. `sigint`: what the program that opened the terminal does with SIGINT."""

    def __init__(self, api: FakeApi, sigint: signal.Handlers) -> None:
        self._pid, self._descriptor = pty.fork()
        if self._pid == 0:
            signal.signal(signal.SIGINT, sigint)
            os.execve(
                sys.executable,
                [sys.executable, "-c", PROGRAM, "chat", "--url", api.url],
                {**os.environ, "TERM": "dumb"},
            )
        self._screen = ""
        self._ended = False

    def read(self, timeout_s: float) -> bool:
        """Take what the chat has printed; False when it printed nothing in time."""
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return False
        try:
            piece = os.read(self._descriptor, 4096)
        except OSError:  # Linux's way to say that the other side of a pty has gone
            piece = b""
        self._ended = not piece
        self._screen += piece.decode()
        return True

    def wait_for(self, text: str) -> None:
        """Read until `text` has come; consumes everything up to it."""
        while text not in self._screen:
            assert self.read(20), f"{text!r} did not come: {self._screen!r}"
            assert not self._ended, f"the chat ended before {text!r}: {self._screen!r}"
        self._screen = self._screen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def press_until_it_ends(self, key: str, presses: int = 10) -> int:
        """Press until the chat has ended; its status.

        More than once, as a person would: CPython loses a Ctrl-C that comes while readline is about to wait.
        """
        for _ in range(presses):
            self.type(key)
            while not self._ended and self.read(1):
                pass
            if self._ended:
                return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        raise AssertionError(f"{presses} times {key!r} did not end it: {self._screen!r}")

    def close(self) -> None:
        if not self._ended:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._descriptor)


@pytest.fixture(params=[signal.SIG_DFL, signal.SIG_IGN], ids=["in front", "in the background"])
def terminal(api: FakeApi, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    opened = Terminal(api, request.param)
    yield opened
    opened.close()


@pytest.fixture
def cancelled(api: FakeApi) -> threading.Event:
    """The first answer never ends by itself; the event says that its connection was closed."""
    gone = threading.Event()

    def stream(exchange: Exchange) -> None:
        if len(api.asked("/stream")) > 1:
            say("Second answer.")(exchange)
            return
        exchange.start_stream()
        exchange.token(1, "Endless")
        if exchange.wait_until_gone():
            gone.set()

    api.routes["/stream"] = stream
    return gone


def test_ctrl_c_ends_the_answer_and_not_the_chat(api: FakeApi, cancelled: threading.Event, terminal: Terminal) -> None:
    terminal.wait_for("Chatting with fake-1")
    terminal.wait_for("> ")
    terminal.type("one\n")
    terminal.wait_for("Endless")
    terminal.type("\x03")
    terminal.wait_for("[ended]")
    assert cancelled.wait(60)
    terminal.wait_for("> ")
    terminal.type("two\n")
    terminal.wait_for("Second answer.")
    terminal.wait_for("> ")
    assert terminal.press_until_it_ends("\x04") == 0
    assert messages_of(api)[1] == [("user", "one"), ("assistant", "Endless"), ("user", "two")]


def test_ctrl_c_at_the_prompt_asks_and_then_leaves(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    assert terminal.press_until_it_ends("\x03") == 0
    assert "Ctrl-C again, or Ctrl-D, leaves" in terminal._screen


def test_commands_and_long_messages(api: FakeApi, terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("/nonsense\n")
    terminal.wait_for("there is no command /nonsense")
    terminal.type("first \\\n")
    terminal.wait_for(". ")
    terminal.type("second\n")
    terminal.wait_for("Hello there.")
    terminal.wait_for("> ")
    assert terminal.press_until_it_ends("/exit\n") == 0
    assert messages_of(api) == [[("user", "first \nsecond")]]


def test_a_key_is_taken_from_the_environment_and_asked_for(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    def keyed(exchange: Exchange) -> None:
        if exchange.headers.get("authorization") == "Bearer sa-mine":
            exchange.answer(200, {"status": "ready", "data": []})
        else:
            exchange.refuse(401, "invalid_api_key", "This service asks for an API key.")

    api.routes["/ready"] = keyed
    refused = chat(api, "--once", "Hi")
    assert refused.returncode == 1
    assert b"asks for an API key. This command takes the key from the environment variable SERVE_APP_API_KEY" in (
        refused.stderr
    )
    monkeypatch.setenv("SERVE_APP_API_KEY", "sa-mine")
    assert chat(api, "--once", "Hi").stdout == b"Hello there.\n"
