"""The token with which the processes of one Ray authenticate each other.

A program that may call a Ray can run code on its machines: each Serve replica listens on all addresses and unpickles
what it receives. Promises that a Ray of our own has a token that only this user can read, and finds out whether another
Ray asks for one. Knows no Ray: it reads Ray's file and calls Ray's port.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from serve_app.cli.command_error import CommandError
from serve_app.cli.ray_address import address_file

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
ALLOW_OPEN = "--allow-open-cluster"
_ANSWERS_WITHIN_S = 5.0
_TOKEN_BYTES = 32
# Calls without side effects: to Ray's control store, and to the server of Ray Client (ray://).
_CONTROL_STORE_CALL = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_CLIENT_SERVER_CALL = "/ray.rpc.RayletDriver/ClusterInfo"


def own_token(environment: Mapping[str, str], fallback: Path) -> dict[str, str]:
    """The variables that a Ray of our own adds to `environment` to use a token, which is kept in a file of mode 600.

    The file is Ray's default in the home folder, so that `ray` and `serve` find it, or `fallback` where that can't be
    written or read. A token, a file for it or another mode that the user has set is kept. Raises CommandError when
    neither file can be used, or the user's own holds no token.
    """
    # Ray, too, treats an empty variable as not set.
    if environment.get(MODE, "token").lower() != "token" or environment.get(TOKEN):
        return {}
    if named := environment.get(TOKEN_PATH):
        try:
            _keep(Path(named))
        except OSError as error:
            raise CommandError(
                f"{TOKEN_PATH} names {named}, which holds no token ({error.strerror}); correct or unset the variable"
            ) from error
        return {MODE: "token"}
    try:
        _make(token_file(environment))
    except OSError:
        try:
            _make(fallback)
        except OSError as error:
            raise CommandError(
                f"Ray's token can't be written to {fallback} ({error.strerror}); set {TOKEN_PATH} to a file with one"
            ) from error
        return {MODE: "token", TOKEN_PATH: str(fallback)}
    return {MODE: "token"}


def token_file(environment: Mapping[str, str]) -> Path:
    """The file from which Ray reads the token when no variable holds it. The user has a home: `main` ensures that."""
    return Path(environment.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")


def _make(path: Path) -> None:
    """Write a new token unless there is one; let nobody else read it. Raises OSError, also where `_keep` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        _keep(path)
        return
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_TOKEN_BYTES))
    except OSError:  # a full disk
        path.unlink()
        raise


def _keep(path: Path) -> None:
    """Let nobody else read the token at `path`: Ray itself makes the file with the umask's mode, usually 0644.

    Raises OSError unless it is a file, is not empty, and this user can read it; one that sudo left to root fails.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe must not block
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        if not found.st_size:
            raise OSError(errno.ENODATA, "it is empty", str(path))
        if found.st_uid == os.geteuid() and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            os.fchmod(descriptor, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:  # a container's secret on a read-only mount stays as it is
            raise
    finally:
        os.close(descriptor)


def cluster_token(environment: Mapping[str, str], *, allow_open: bool) -> dict[str, str]:
    """The variables to add to `environment` for a running cluster that asks for a token.

    Raises CommandError for a cluster that asks for none, unless `allow_open`, and when there is no token to send.
    """
    address = environment["RAY_ADDRESS"]
    asks = asks_for_token(address, environment)
    if asks is False or (asks is None and environment.get(MODE, "").lower() != "token"):
        if allow_open:
            return {}
        known = "asks for no token" if asks is False else "does not say whether it asks for a token"
        raise CommandError(
            f"the Ray cluster at {address} {known}. Without a token, everybody who reaches its nodes can run code on "
            f"them. Start it with {MODE}=token on each node (docs/operations.md says how), or add {ALLOW_OPEN} if "
            "nobody else can reach it"
        )
    if not environment.get(TOKEN) and not os.access(token_file(environment), os.R_OK):
        raise CommandError(
            f"the Ray cluster at {address} asks for a token, and there is none in {TOKEN}, in the file {TOKEN_PATH} "
            "or in ~/.ray/auth_token; copy that file from the cluster's head node, with mode 600"
        )
    return {MODE: "token"} if MODE not in environment else {}


def asks_for_token(address: str, environment: Mapping[str, str]) -> bool | None:
    """Whether the cluster at `auto`, `host:port` or `ray://host:port` turns away a call without a token.

    None where that can't be found out.
    """
    import grpc  # imported late: a Ray of our own does not need it

    if address == "auto":
        try:
            address = address_file(environment).read_text(encoding="utf-8").strip()
        except OSError:
            return None
    scheme, _, target = address.rpartition("://")
    call = _CLIENT_SERVER_CALL if scheme == "ray" else _CONTROL_STORE_CALL
    with grpc.insecure_channel(target) as channel:
        try:
            channel.unary_unary(call)(b"", timeout=_ANSWERS_WITHIN_S)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return None
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False
