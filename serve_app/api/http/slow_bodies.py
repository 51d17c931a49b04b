"""Limits how many clients may send their bodies slowly.

Promises that connections which send nothing take no place from others: a request whose body has not arrived soon needs
a place here, and does not yet count among the requests in progress. Knows no HTTP.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

PROMPTLY_S = 3.0
"""A body that is there by then needs no place: nearly all are sent together with their headers. Not less: when hundreds
come at once, an ingress on a busy machine may take more than a second to read what has long been sent."""
MAX_SLOW = 256
MAX_SLOW_PER_CLIENT = 16
"""Of 256: so many addresses are needed to take all places, for 30 s at a time."""


class TooManySlowBodies(Exception):
    """No place is left, for this client or for anybody."""


class SlowBodies:
    """The bodies that are waited for, in one process."""

    def __init__(self, limit: int = MAX_SLOW, per_client: int = MAX_SLOW_PER_CLIENT) -> None:
        self._limit = limit
        self._per_client = per_client
        self._waiting: Counter[str | None] = Counter()
        """By client; None counts all whose client is not known."""

    @contextmanager
    def place(self, address: str | None) -> Iterator[None]:
        """One of the places, for as long as the block runs; `address` is None where nobody knows the client's.

        Raises `TooManySlowBodies`.
        """
        client = _client(address)
        if self._waiting.total() >= self._limit or (client is not None and self._waiting[client] >= self._per_client):
            raise TooManySlowBodies
        self._waiting[client] += 1
        try:
            yield
        finally:
            self._waiting[client] -= 1
            if not self._waiting[client]:
                del self._waiting[client]


def _client(address: str | None) -> str | None:
    """What one client can't change at will: of IPv6 the 64 bits that its provider gave it.

    None for an address of this machine: it may be a proxy's, which all clients share.
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
