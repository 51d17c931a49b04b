"""The address of the client that sent a request. Behind HAProxy an ingress itself sees only HAProxy's address.

Promises an address that the client could not choose, or None. `X-Forwarded-For` is ignored: anybody can send it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from starlette.types import Scope

SECRET = "SERVE_APP_CLIENT_SECRET"
"""Environment variable: the secret that HAProxy, as `serve-app serve` configures it, puts before the address in the
header."""
HEADER = "x-serve-app-client"
_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"


class ClientAddresses:
    """Puts the client's address into a request's scope, or None where it is not known."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._behind_haproxy = environment.get(_HAPROXY) == "1"
        secret = environment.get(SECRET)
        self._prefix = f"{secret} ".encode() if secret else None

    def correct(self, scope: Scope) -> None:
        """Set the scope's `client`. With Serve's Python proxy it is right already."""
        if not self._behind_haproxy:
            return
        scope["client"] = None
        if self._prefix is None:
            return
        for name, value in scope["headers"]:
            if name == HEADER.encode() and value.startswith(self._prefix):
                scope["client"] = (value[len(self._prefix) :].decode("ascii", "replace"), 0)
