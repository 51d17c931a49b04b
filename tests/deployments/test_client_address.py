"""Clients try to pass for others."""

from __future__ import annotations

import pytest

from serve_app.deployments.client_address import SECRET, ClientAddresses

HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
OURS = {**HAPROXY, SECRET: "s3cret"}


def client(environment: dict[str, str], *headers: tuple[str, str]) -> tuple[str, int] | None:
    scope = {
        "type": "http",
        "client": ("127.0.0.1", 9),
        "headers": [(name.encode(), value.encode()) for name, value in headers],
    }
    ClientAddresses(environment).correct(scope)
    return scope["client"]  # type: ignore[return-value]


def test_serves_python_proxy_tells_it() -> None:
    assert client({}, ("x-forwarded-for", "192.0.2.1"), ("x-serve-app-client", "192.0.2.1")) == ("127.0.0.1", 9)


def test_our_haproxy_tells_it() -> None:
    assert client(OURS, ("x-serve-app-client", "s3cret 2001:db8::1")) == ("2001:db8::1", 0)


@pytest.mark.parametrize("value", ["192.0.2.1", "guess 192.0.2.1", "s3cret192.0.2.1", " 192.0.2.1", ""])
@pytest.mark.parametrize("environment", [OURS, HAPROXY, {**HAPROXY, SECRET: ""}])
def test_nobody_else_does(environment: dict[str, str], value: str) -> None:
    assert client(environment, ("x-serve-app-client", value), ("x-forwarded-for", "192.0.2.1")) is None
