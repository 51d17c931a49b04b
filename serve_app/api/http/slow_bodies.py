"""Limits how many clients may send their bodies slowly.

Promises that connections which send nothing take no place from others: a request whose body has not arrived within
`PROMPTLY_S` needs a place here, and does not yet count among the requests in progress. Knows no HTTP.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

PROMPTLY_S = 3.0
"""A body that arrives within this time needs no place: nearly all are sent together with their headers. Less would be
too short: when hundreds come at once, an ingress on a busy machine may take more than a second to read bodies that were
sent long before."""
MAX_SLOW = 256
MAX_SLOW_PER_CLIENT = 16
"""An attacker thus needs 256 / 16 = 16 addresses to take all places, for 30 s at a time."""


class TooManySlowBodies(Exception):
    """No place is left, for this client or for anybody."""


class SlowBodies:
    """The slow bodies that one process waits for."""

    def __init__(self, limit: int = MAX_SLOW, per_client: int = MAX_SLOW_PER_CLIENT) -> None:
        self._limit = limit
        self._per_client = per_client
        self._waiting: Counter[str | None] = Counter()
        """Number of bodies by client; None stands for all clients that are not known."""

    @contextmanager
    def place(self, address: str | None) -> Iterator[None]:
        """Take one of the places for as long as the block runs. Raises `TooManySlowBodies`.

        `address`: the client's; None: not known.
        """
        client = client_of(address)
        if self._waiting.total() >= self._limit or (client is not None and self._waiting[client] >= self._per_client):
            raise TooManySlowBodies
        self._waiting[client] += 1
        try:
            yield
        finally:
            self._waiting[client] -= 1
            if not self._waiting[client]:
                del self._waiting[client]


def client_of(address: str | None) -> str | None:
    """The part of an address that a client can't change at will: for IPv6 the 64-bit prefix that its provider assigned.

    None for a loopback address: it may be a proxy's, which all clients share.
    """
    if address is None:
        return None
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_loopback:
        return None
    return str(ipaddress.ip_network((int(ip), 64), strict=False) if ip.version == 6 else ip)
