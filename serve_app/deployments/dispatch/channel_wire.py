"""The messages of a token channel between one model replica and one ingress process.

The ingress sends one line: the replica's secret and its own id. Then the model server sends frames: four bytes of
length, and the numbered replies of one step (`core.encode_replies`). The first frame holds no replies and says that the
channel is open. The replica's load goes among the replies, under the number `LOAD`, when the channel opens and when it
has changed. Knows no Ray and no text.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from serve_app.core import MessageError, ReplicaLoad, Reply, decode_news, encode_replies

ChannelItem = tuple[int, Reply | ReplicaLoad]
"""Number of the attempt, and what its replica says."""
LOAD = 0
"""Stands where a reply has the number of its attempt. Attempts are numbered from 1."""
MAX_MESSAGE_BYTES = 2**26
"""A frame that claims to be longer is invalid."""
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds of silence before the first TCP keep-alive probe, seconds between two probes, and the number of unanswered
probes that ends the connection."""
_LENGTH = struct.Struct(">I")


def keep_alive(transport: asyncio.BaseTransport) -> None:
    """Make a connection end when the other machine has vanished, even if nothing is being sent."""
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@dataclass(frozen=True, slots=True)
class ChannelAddress:
    """Where an ingress connects to a model replica's channels, and the secret that it has to show."""

    host: str
    port: int
    secret: str = field(repr=False)

    def __str__(self) -> str:
        """The form that a replica's metadata for Serve's routers holds; `parse` reads it."""
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
    """The id of the ingress that asks for a channel; None if the secret is wrong or the id is missing."""
    given, _, ingress_id = line.partition(b" ")
    return ingress_id.decode().strip() or None if hmac.compare_digest(given, secret.encode()) else None


def encode(items: Sequence[ChannelItem]) -> bytes:
    """One frame."""
    message = encode_replies(items)
    return _LENGTH.pack(len(message)) + message


class Frames:
    """Splits the bytes of a connection into messages."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> Iterator[list[ChannelItem]]:
        """The messages that are complete now. Raises `MessageError` for bytes that `encode` did not make."""
        received = self._received
        received += data
        start = 0
        while len(received) >= (begin := start + _LENGTH.size):
            (length,) = _LENGTH.unpack_from(received, start)
            if length > MAX_MESSAGE_BYTES:
                raise MessageError("that is no frame of a channel")
            if len(received) < begin + length:
                break
            start = begin + length
            yield decode_news(bytes(received[begin:start]))
        del received[:start]
