"""The messages of a token channel between one model replica and one ingress process.

The ingress's only line says who it is and that it may. Then the model server sends frames: four bytes of length, and
the numbered replies of one step (`core.encode_replies`); the first frame has none and says that the channel is open.
Knows no Ray and no text.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from serve_app.core import MessageError, Reply, decode_replies, encode_replies

ChannelItem = tuple[int, Reply]
"""Number of the attempt, and what its replica says."""
MAX_MESSAGE_BYTES = 2**26
"""A frame that claims to be longer is none of ours."""
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds without a word before the other machine is asked whether it is there, seconds between two such questions,
and how many go unanswered before the connection has ended."""
_LENGTH = struct.Struct(">I")


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


def encode(items: Sequence[ChannelItem]) -> bytes:
    """One frame."""
    message = encode_replies(items)
    return _LENGTH.pack(len(message)) + message


class Frames:
    """Cuts what a connection brings into messages."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> Iterator[list[ChannelItem]]:
        """The messages that are whole now. Raises `MessageError` for what `encode` did not make."""
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
            yield decode_replies(bytes(received[begin:start]))
        del received[:start]
