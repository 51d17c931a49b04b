"""The text that the terminal shows when the model can serve: what it is, where, and what to do next.

It is made from the model's card and from Serve's own data. With a plain `serve run` an ingress replica prints it.
`serve-app serve` prints it itself, without Ray's prefix before each line, and turns the replicas' banner off.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple

from serve_app.client.protocol import KEY_VARIABLE
from serve_app.core import ModelCard
from serve_app.deployments.ray_internals import serve_details

SILENCE = "SERVE_APP_BANNER"
"""Environment variable: 0 leaves the banner out, for a program that starts `serve run` and prints the banner itself."""
LATEST_LOGS = Path("/tmp/ray/session_latest/logs/serve")
"""The log folder of the Ray that was started last on this machine, for when the replica's own is not known."""
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Access(NamedTuple):
    """Who may use a service."""

    keys_required: bool = False
    warning: str = ""
    """What its operator should know; "" if there is nothing."""


OPEN = Access()
"""Everybody may, and that is as it should be."""


def banner(
    card: ModelCard,
    url: str,
    logs: Path,
    cache: Path,
    *,
    grpc: str | None = None,
    stop: str = "Ctrl-C, or serve shutdown",
    access: Access = OPEN,
) -> str:
    """The text, without a trailing newline. `grpc`: host and port, if it is served. `stop`: how to end the service."""
    key = f'-H "Authorization: Bearer ${KEY_VARIABLE}" ' if access.keys_required else ""
    streams = max(1, card.kv_capacity_tokens // card.context_tokens)
    body = '{"messages": [{"role": "user", "content": "What is a prime number?"}]}'
    lines = [
        "",
        f"serve_app is ready at {url}",
        "",
        f"  model    {card.name}, {card.dtype} on {card.device}",
        f"  memory   {_gb(card.weights_bytes)} of weights and {_gb(card.kv_cache_bytes)} of KV cache in each replica",
        f"  holds    {streams} stream{'' if streams == 1 else 's'} of {card.context_tokens:,} tokens, or more shorter "
        f"ones ({card.kv_capacity_tokens:,} tokens; attention: {card.attention_backend})",
        *(f"  note     {note}" for note in card.notes),
        *([f"  WARNING  {access.warning}"] if access.warning else []),
        *([f"  keys     needed: put yours into {KEY_VARIABLE} for the commands below"] if access.keys_required else []),
        f"  logs     {logs}",
        f"  cache    {cache}",
        f"  URLs     {url}/stream, and OpenAI's {url}/v1" + ("" if grpc is None else f", and gRPC at {grpc}"),
        f"  chat     {url}/ in a browser, or serve-app chat --url {url}",
        f"  stop     {stop}",
        f"  try      curl -N {url}/stream {key}-H 'Content-Type: application/json' -d '{body}'",
        "",
    ]
    return "\n".join(lines)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def say(text: str) -> None:
    """Write to the terminal of `serve run`, also where Serve redirects `print` to its log."""
    stdout = sys.__stdout__
    if stdout is not None and os.environ.get(SILENCE) != "0":
        stdout.write(text + "\n")
        stdout.flush()


def address(host: str, port: int, route_prefix: str | None, *, https: bool) -> str:
    """The URL of an application whose service listens there, for a program on the same machine."""
    return f"http{'s' if https else ''}://{authority(host, port)}{(route_prefix or '/').rstrip('/')}"


def authority(host: str, port: int) -> str:
    """Host and port of a service that listens there, for a program on the same machine."""
    host = _WILDCARDS.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def service_address(app_name: str) -> tuple[str, str | None]:
    """Where this application answers, for a program on the machine of the proxy: its URL, and `host:port` for gRPC.

    Blocks for a round trip.
    """
    details = serve_details()
    options, grpc = details["http_options"] or {}, details["grpc_options"] or {}
    host, port = options.get("host") or "127.0.0.1", options.get("port", 8000)
    route_prefix = details["applications"][app_name]["route_prefix"]
    url = address(host, port, route_prefix, https=bool(options.get("ssl_certfile")))
    return url, authority(host, grpc.get("port", 9000)) if grpc.get("grpc_servicer_functions") else None


def log_folder() -> Path:
    """The folder of this replica's log file, beside those of the others on its machine."""
    for handler in logging.getLogger("ray.serve").handlers:
        target = getattr(handler, "target", handler)
        if isinstance(target, logging.FileHandler):
            return Path(target.baseFilename).parent
    return LATEST_LOGS
