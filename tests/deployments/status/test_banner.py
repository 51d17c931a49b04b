"""What the terminal says when the model can serve."""

from __future__ import annotations

import logging
import shlex
import sys
from io import StringIO
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest
from fake_model_server import CARD

from serve_app.deployments.status.banner import SILENCE, Access, address, banner, log_folder, say

URL = "http://127.0.0.1:8000"


def test_it_says_what_a_user_needs() -> None:
    text = banner(CARD, URL, Path("/logs"), Path("/cache"))
    for fact in (
        CARD.name,
        "10 streams of 1,000 tokens",
        "10,000 tokens",
        "/logs",
        "/cache",
        URL,
        "Ctrl-C",
        *CARD.notes,
    ):
        assert fact in text


def test_its_curl_line_can_be_pasted() -> None:
    text = banner(CARD, URL, Path("/logs"), Path("/cache"))
    line = next(line for line in text.splitlines() if "curl" in line)
    words = shlex.split(line[line.index("curl") :])
    assert words[:3] == ["curl", "-N", f"{URL}/stream"]
    assert words[-1] == '{"messages": [{"role": "user", "content": "What is a prime number?"}]}'


def test_with_keys_its_curl_line_sends_one() -> None:
    text = banner(CARD, URL, Path("/logs"), Path("/cache"), access=Access(True))
    line = next(line for line in text.splitlines() if "curl" in line)
    words = shlex.split(line[line.index("curl") :])
    assert words[3:5] == ["-H", "Authorization: Bearer $SERVE_APP_API_KEY"]
    assert "SERVE_APP_API_KEY" in text.partition("keys")[2]


def test_a_service_for_everybody_says_so() -> None:
    text = banner(CARD, URL, Path("/logs"), Path("/cache"), access=Access(False, "everybody can use it"))
    assert "WARNING  everybody can use it" in text


@pytest.mark.parametrize(("setting", "said"), [(None, True), ("1", True), ("0", False)])
def test_whoever_says_it_itself_can_ask_for_silence(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, said: bool
) -> None:
    stdout = StringIO()
    monkeypatch.setattr(sys, "__stdout__", stdout)
    monkeypatch.delenv(SILENCE, raising=False)
    if setting is not None:
        monkeypatch.setenv(SILENCE, setting)
    say("ready")
    assert stdout.getvalue() == ("ready\n" if said else "")


def test_the_log_folder_is_where_serve_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = logging.FileHandler(tmp_path / "replica.log")
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [MemoryHandler(1, target=file)])
    assert log_folder() == tmp_path
    file.close()


@pytest.mark.parametrize(
    ("host", "route_prefix", "https", "url"),
    [
        ("127.0.0.1", "/", False, "http://127.0.0.1:8000"),
        ("0.0.0.0", None, False, "http://127.0.0.1:8000"),
        ("::", "/chat/", True, "https://[::1]:8000/chat"),
        ("fd00::7", "/chat", False, "http://[fd00::7]:8000/chat"),
        ("chat.example.org", "/", False, "http://chat.example.org:8000"),
    ],
)
def test_the_address_is_one_that_this_machine_reaches(
    host: str, route_prefix: str | None, https: bool, url: str
) -> None:
    assert address(host, 8000, route_prefix, https=https) == url
