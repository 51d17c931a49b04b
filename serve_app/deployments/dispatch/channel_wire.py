"""What goes over a channel: lines between one model replica and one ingress replica.

The ingress's only line says who it is and that it may. The model server's lines are JSON, each with the batches of one
step; the first has none and says that the channel is open. Knows no Ray and no text.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field

from serve_app.core import GenerationStats, TokenBatch, TokenLogprobs

ChannelItem = tuple[int, TokenBatch]
"""Number of the attempt, and a batch that is not its last."""
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds without a word before the other machine is asked whether it is there, seconds between two such questions,
and how many go unanswered before the connection has ended."""


def keep_alive(transport: asyncio.BaseTransport) -> None:
    """Have a connection end whose other machine has vanished, though nothing is to be said."""
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@dataclass(frozen=True, slots=True)
class ChannelAddress:
    """Where a model replica's channels are had, and what shows that one may have them."""

    host: str
    port: int
    secret: str = field(repr=False)

    def __str__(self) -> str:
        """As it travels in what a replica says of itself to Serve's routers; `parse` reads it."""
        return f"{self.host} {self.port} {self.secret}"

    @classmethod
    def parse(cls, text: str) -> ChannelAddress | None:
        """None for a replica that has no channels."""
        if not text:
            return None
        host, port, secret = text.split()
        return cls(host, int(port), secret)


def greeting(address: ChannelAddress, ingress_id: str) -> bytes:
    """The first line from `ingress_id`."""
    return f"{address.secret} {ingress_id}\n".encode()


def read_greeting(line: bytes, secret: str) -> str | None:
    """Who asks for a channel; None when it isn't one of ours."""
    given, _, ingress_id = line.partition(b" ")
    return ingress_id.decode().strip() or None if hmac.compare_digest(given, secret.encode()) else None


def encode(items: Iterable[ChannelItem]) -> bytes:
    """One line, its end included. The batches have no finish reason."""
    return json.dumps([_encode(number, batch) for number, batch in items], separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> list[ChannelItem]:
    """Raises ValueError, TypeError or IndexError for a line that `encode` did not make."""
    return [(item[0], _decode(*item[1:])) for item in json.loads(line)]


def _encode(number: int, batch: TokenBatch) -> list[object]:
    item: list[object] = [number, batch.first_index, batch.token_ids]
    if batch.logprobs is not None or batch.stats is not None:
        item.append(None if batch.logprobs is None else [(each.logprob, each.top) for each in batch.logprobs])
        item.append(None if batch.stats is None else astuple(batch.stats))
    return item


def _decode(
    first_index: int,
    token_ids: list[int],
    logprobs: list[tuple[float, list[tuple[int, float]]]] | None = None,
    stats: list[object] | None = None,
) -> TokenBatch:
    return TokenBatch(
        first_index,
        tuple(token_ids),
        None
        if logprobs is None
        else tuple(TokenLogprobs(own, tuple((token, value) for token, value in top)) for own, top in logprobs),
        stats=None if stats is None else GenerationStats(*stats),  # type: ignore[arg-type]
    )
