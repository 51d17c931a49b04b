"""What the terminal shows when a service is ready, and the service's address.

All that is said of the model comes from the model card that the server sends.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from serve_app.cli.config_file import ConfigFile
from serve_app.cli.ray_folder import PLACE
from serve_app.client import Readiness
from serve_app.core import ModelCard
from serve_app.deployments.status import banner
from serve_app.models.cache import cache_directory

_STOP = "Ctrl-C here, or serve-app stop in another terminal"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the first application is reached from this machine."""

    url: str
    grpc: str | None
    """`host:port`; None: without gRPC."""

    @classmethod
    def of(cls, file: ConfigFile, host: str, port: int, grpc_port: int | None) -> Address:
        """The address of a service that listens there."""
        url = banner.address(host, port, file.apps[0].route_prefix, https=file.https)
        return cls(url, None if grpc_port is None else banner.authority(host, grpc_port))


def ready(file: ConfigFile, address: Address, serve_pid: int, state: Readiness) -> None:
    """Print what is served there, from what /ready said."""
    try:
        card = msgspec.convert((state.details or {}).get("model"), ModelCard)
    except msgspec.ValidationError:  # a server of another version
        print(f"\nserve_app is ready at {address.url}\n", flush=True)
        return
    cache = cache_directory(file.apps[0].config.cache_dir)
    logs = _log_folder(serve_pid)
    said = (state.details or {}).get("access") or {}
    access = banner.Access(said.get("keys_required") is True, str(said.get("warning") or ""))
    print(banner.banner(card, address.url, logs, cache, grpc=address.grpc, stop=_STOP, access=access), flush=True)


def _log_folder(serve_pid: int) -> Path:
    """Serve's logs in the folder of the Ray session that process `serve_pid` started: its name ends with that id.

    Without such a folder the service joined a running cluster, and the answer is `LATEST_LOGS`. A Ray of our own
    always has $RAY_TMPDIR (`ray_folder`).
    """
    sessions = Path(os.environ.get(PLACE, "/tmp"), "ray").glob(f"session_*_{serve_pid}")
    return next((session / "logs" / "serve" for session in sessions), banner.LATEST_LOGS)
