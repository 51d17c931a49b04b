"""The token of a Ray of our own, and clusters that ask for none, with a stand-in for Ray's control store."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import yaml

from serve_app.cli.command_error import CommandError
from serve_app.cli.main import main
from serve_app.cli.ray_token import asks_for_token, cluster_token, own_token


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_ray_of_our_own_has_a_token_that_only_this_user_reads(home: Path) -> None:
    found = home / ".ray" / "auth_token"
    assert own_token({}, home / "fallback") == {"RAY_AUTH_MODE": "token"}
    token = found.read_text()
    assert len(token) == 64
    assert mode(found) == 0o600
    found.chmod(0o644)  # as Ray itself writes it
    assert own_token({}, home / "fallback") == {"RAY_AUTH_MODE": "token"}
    assert mode(found) == 0o600
    assert found.read_text() == token, "other programs of this user have it"


def test_a_home_that_can_not_be_written_has_its_token_elsewhere(home: Path) -> None:
    (home / ".ray").touch()
    fallback = home / "state" / "ray_auth_token"
    assert own_token({}, fallback) == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(fallback)}
    assert len(fallback.read_text()) == 64
    assert mode(fallback) == 0o600


def test_what_the_user_has_set_is_left_alone(home: Path) -> None:
    fallback = home / "fallback"
    assert own_token({"RAY_AUTH_MODE": "disabled"}, fallback) == {}
    assert own_token({"RAY_AUTH_TOKEN": "x"}, fallback) == {}
    own = home / "own"
    own.write_text("x")
    own.chmod(0o640)
    assert own_token({"RAY_AUTH_TOKEN_PATH": str(own)}, fallback) == {"RAY_AUTH_MODE": "token"}
    assert mode(own) == 0o600
    assert sorted(path.name for path in home.iterdir()) == ["own"]


def test_empty_variables_are_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    before = mode(home)
    assert own_token({"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": ""}, home / "fallback") == {"RAY_AUTH_MODE": "token"}
    assert mode(home) == before, "the empty path is the current folder"
    assert (home / ".ray" / "auth_token").exists()


@pytest.mark.parametrize(
    ("kind", "said"), [("missing", "No such file"), ("folder", "it is no file"), ("empty", "it is empty")]
)
def test_a_place_that_holds_no_token_is_named(home: Path, kind: str, said: str) -> None:
    own = home / "own"
    if kind == "folder":
        own.mkdir(mode=0o755)
    elif kind == "empty":
        own.touch()
    with pytest.raises(CommandError, match=rf"RAY_AUTH_TOKEN_PATH names .*own, which holds no token \({said}"):
        own_token({"RAY_AUTH_TOKEN_PATH": str(own)}, home / "fallback")
    assert kind != "folder" or mode(own) == 0o755


def test_a_token_on_a_read_only_file_system_is_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, mode: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    own = home / "own"
    own.write_text("x")
    own.chmod(0o644)
    monkeypatch.setattr(os, "fchmod", refuse)
    assert own_token({"RAY_AUTH_TOKEN_PATH": str(own)}, home / "fallback") == {"RAY_AUTH_MODE": "token"}


def test_a_token_that_can_not_be_read_is_made_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that sudo has left in this home, which is another user's and of mode 600; or one that a full disk has cut."""
    fallback = home / "state" / "ray_auth_token"
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").touch()
    assert own_token({}, fallback) == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(fallback)}
    (home / ".ray" / "auth_token").write_text("x")
    usual = os.open

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if path == home / ".ray" / "auth_token" and not flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied")
        return usual(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert own_token({}, fallback) == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(fallback)}


def test_no_place_for_a_token_is_said(home: Path) -> None:
    (home / ".ray").touch()
    (home / "state").touch()
    with pytest.raises(CommandError, match=r"can't be written to .*state/ray_auth_token .*set RAY_AUTH_TOKEN_PATH"):
        own_token({}, home / "state" / "ray_auth_token")


def test_a_disk_without_room_leaves_no_token_without_text(home: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from serve_app.cli.ray_token import _make
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    _make(Path(sys.argv[1]))
except OSError:
    sys.exit(7)
"""
    token = home / "token"
    assert subprocess.run([sys.executable, "-c", script, str(token)], check=False).returncode == 7
    assert not token.exists()


class ControlStore(grpc.GenericRpcHandler):
    """Answers every call, or turns away those without a token."""

    def __init__(self, asks: bool) -> None:
        self.asks = asks

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if self.asks:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def control_store(*, asks: bool) -> Iterator[str]:
    """The address of one."""
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads, handlers=(ControlStore(asks),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


@pytest.mark.parametrize("asks", [True, False])
def test_a_cluster_is_asked_whether_it_asks(asks: bool, home: Path) -> None:
    with control_store(asks=asks) as address:
        assert asks_for_token(address, {}) is asks
        assert asks_for_token(f"ray://{address}", {}) is asks
        (home / "ray").mkdir()
        (home / "ray" / "ray_current_cluster").write_text(address)
        assert asks_for_token("auto", {"RAY_TMPDIR": str(home)}) is asks
    assert asks_for_token("auto", {"RAY_TMPDIR": str(home / "nowhere")}) is None
    assert asks_for_token("127.0.0.1:1", {}) is None


def test_a_cluster_without_a_token_is_refused_unless_told_otherwise(home: Path) -> None:
    with control_store(asks=False) as address:
        with pytest.raises(CommandError, match=r"asks for no token\. .* RAY_AUTH_MODE=token .* --allow-open-cluster"):
            cluster_token({"RAY_ADDRESS": address}, allow_open=False)
        # What this side would send says nothing of what that side demands.
        with pytest.raises(CommandError, match="asks for no token"):
            cluster_token({"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}, allow_open=False)
        assert cluster_token({"RAY_ADDRESS": address}, allow_open=True) == {}
    silent = {"RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_TOKEN": "x"}
    with pytest.raises(CommandError, match="does not say whether it asks"):
        cluster_token(silent, allow_open=False)
    assert cluster_token({**silent, "RAY_AUTH_MODE": "token"}, allow_open=False) == {}


def test_on_a_cluster_with_a_token_it_must_be_at_hand(home: Path) -> None:
    with control_store(asks=True) as address:
        with pytest.raises(CommandError, match="copy that file from the cluster's head node"):
            cluster_token({"RAY_ADDRESS": address}, allow_open=False)
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("x")
        assert cluster_token({"RAY_ADDRESS": address}, allow_open=False) == {"RAY_AUTH_MODE": "token"}
        assert cluster_token({"RAY_ADDRESS": address, "RAY_AUTH_MODE": "TOKEN"}, allow_open=False) == {}


def test_serve_and_check_refuse_it(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    application = {"name": "a", "import_path": "serve_app.app:build", "args": {"cache_dir": str(home / "cache")}}
    config = home / "c.yaml"
    config.write_text(yaml.safe_dump({"applications": [application]}))
    monkeypatch.setattr("serve_app.cli.serve.SERVE_RUN", ("false",))  # whatever is to be served ends at once
    with control_store(asks=False) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        for command in ("serve", "check"):
            assert main([command, str(config)]) == 1
            assert "asks for no token" in capsys.readouterr().err
            main([command, str(config), "--allow-open-cluster"])
            assert "token" not in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert main(["check", str(config)]) == 0, "a Ray of one's own"
