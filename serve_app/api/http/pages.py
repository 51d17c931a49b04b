"""What web pages may do with this service: which host names it answers to, and whose pages may call it.

Promises that a page of another site can neither drive the model nor read an answer unless `api.cors_origins` names it;
DNS rebinding does not get around this. Of the headers checked here, a client that is no browser sends only `Host`.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response

from serve_app.api.errors import ApiError
from serve_app.api.limit_headers import ANTHROPIC_NAMES, OPENAI_NAMES
from serve_app.config import ApiConfig

_PORTS = {"http": 80, "https": 443}
_OWN_SITES = frozenset({"same-origin", "none"})
"""`Sec-Fetch-Site` for our own pages, and for an address that a user typed. `same-site` is not among them: it can be
another port of this machine."""
_EXPOSED = ", ".join(
    (
        "x-request-id, request-id, x-seed, x-stream-id, x-ignored-fields, x-clamped-fields",
        "retry-after, retry-after-ms, x-should-retry",
        *OPENAI_NAMES,
        *ANTHROPIC_NAMES,
    )
)
"""Headers that pages of other origins may read."""
_PREFLIGHT_AGE_S = 600
_LONGEST_NAME = 100
"""An error message repeats at most this many characters of a header that the client sent."""


class Pages:
    """The rules of one service."""

    def __init__(self, config: ApiConfig, bound_to: str | None = None) -> None:
        """`bound_to`: the host that the service listens on; None: not known.

        `Host` is checked if `bound_to` is a loopback address or `config.hosts` is not empty, but not if "*" is one of
        `config.hosts`. The check is against DNS rebinding: if an attacker points a name at 127.0.0.1, a page under this
        name has the service's own origin for a browser, and only `Host` shows the name. An IP address as `Host` is
        always accepted, since there is no name to rebind.
        """
        names = {_plain_name(name) for name in config.hosts}
        limited = bool(names) or (bound_to is not None and is_loopback(bound_to))
        self._hosts = None if not limited or "*" in names else names | {"localhost", _plain_name(bound_to or "")}
        self._any_origin = "*" in config.cors_origins
        self._origins = frozenset(origin.rstrip("/").lower() for origin in config.cors_origins)

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raise `ApiError` 403 for a `Host` that is not the service's, and for a page that may not call it."""
        for host in headers.getlist("host"):  # HTTP/1.0 requests may have none
            if not self._answers_to(host):
                message = (
                    f"This service does not answer to the host '{host[:_LONGEST_NAME]}'. Ask for it by its address or "
                    "as localhost, or list the name in api.hosts of its config."
                )
                raise ApiError(403, message, code="host_not_allowed")
        if not self._may_call(method, path, headers):
            page = headers.get("origin", "another site")[:_LONGEST_NAME]
            message = f"Pages of {page} may not call this service; list their origin in api.cors_origins of its config."
            raise ApiError(403, message, code="origin_not_allowed")

    def answer_headers(self, headers: Headers) -> Mapping[str, str]:
        """The CORS headers of every answer to this request: with them a page of an allowed origin can read it."""
        if not self._origins:
            return {}
        allowed = self._allowed_origin(headers)
        vary = {} if self._any_origin else {"vary": "Origin"}
        if allowed is None:
            return vary
        return {"access-control-allow-origin": allowed, "access-control-expose-headers": _EXPOSED, **vary}

    def preflight(self, method: str, headers: Headers) -> Response | None:
        """The answer to a CORS preflight from an allowed origin; None for any other request."""
        asked = headers.get("access-control-request-method")
        if method != "OPTIONS" or asked is None or self._allowed_origin(headers) is None:
            return None
        allowed = {
            "access-control-allow-methods": "DELETE, GET, POST",
            "access-control-max-age": str(_PREFLIGHT_AGE_S),
            "allow": "DELETE, GET, OPTIONS, POST",
        }
        if wanted := headers.get("access-control-request-headers"):
            allowed["access-control-allow-headers"] = wanted
        if headers.get("access-control-request-private-network") == "true":
            allowed["access-control-allow-private-network"] = "true"
        return Response(json.dumps({"methods": ["DELETE", "GET", "POST"]}), 200, allowed, media_type="application/json")

    def _answers_to(self, host: str) -> bool:
        if self._hosts is None:
            return True
        split = _split_host(host)
        if split is None:
            return False
        name, _ = split
        return _is_address(name) or any(_matches(name, pattern) for pattern in self._hosts)

    def _may_call(self, method: str, path: str, headers: Headers) -> bool:
        if self._allowed_origin(headers) is not None or self._any_origin:
            return True
        site = headers.get("sec-fetch-site")
        if site is None:
            origin = headers.get("origin")
            return origin is None or _is_same(origin, headers.get("host", ""))
        return site in _OWN_SITES or _follows_a_link(method, path, headers)

    def _allowed_origin(self, headers: Headers) -> str | None:
        origin = headers.get("origin")
        if origin is None:
            return None
        if self._any_origin:
            return "*"
        return origin if origin.lower() in self._origins else None


def is_loopback(host: str) -> bool:
    """Whether a service that listens on `host` can be reached from its own machine only."""
    name = _plain_name(host)
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def _follows_a_link(method: str, path: str, headers: Headers) -> bool:
    """Whether a user follows a link to one of our pages, which is allowed from any site.

    Endpoints that generate are no pages. Pages in frames don't count: the user would not see whose they are.
    """
    to_a_page = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    generates = path == "/stream" or path.startswith("/v1/")
    return to_a_page and method in ("GET", "HEAD") and not generates


def _is_same(origin: str, host: str) -> bool:
    """Whether `origin` and `host` are the same host and port, whether or not a proxy has ended TLS before us."""
    scheme, _, page_host = origin.partition("://")
    asked, from_ = _split_host(host), _split_host(page_host)
    if scheme not in _PORTS or asked is None or from_ is None:
        return False
    port = _PORTS[scheme]
    return (asked[0], asked[1] or port) == (from_[0], from_[1] or port)


def _split_host(host: str) -> tuple[str, int | None] | None:
    """`Example.org.:80` -> (`example.org`, 80); None where it is neither a name nor an address."""
    try:
        url = urlsplit(f"//{host.strip()}")
        port = url.port
    except ValueError:
        return None
    if url.hostname is None or url.path or url.query or url.fragment or "@" in url.netloc:
        return None
    return _plain_name(url.hostname), port


def _plain_name(name: str) -> str:
    return name.strip().lower().removeprefix("[").removesuffix("]").removesuffix(".")


def _matches(name: str, pattern: str) -> bool:
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
