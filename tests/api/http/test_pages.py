"""Pages of other sites try to get in: by their own origin, by a rebound name, and with what browsers send unasked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from asgi_driver import Exchange
from fake_replica import FakeReplica, says
from memory_metrics import MemoryMetrics
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers

from serve_app.api.errors import ApiError
from serve_app.api.http.loading import create_loading_app
from serve_app.api.http.pages import Pages, is_loopback
from serve_app.config import ApiConfig
from serve_app.core import LoadStage

HI = {"messages": [{"role": "user", "content": "Hi"}]}
PAGE = "http://localhost:3000"
EVIL = "http://evil.example"
FETCH = {"sec-fetch-mode": "cors", "sec-fetch-dest": "empty"}
IMAGE = {"sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}
LINK = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
FRAME = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}
MakeApp = Callable[..., Starlette]


def refusal(pages: Pages, method: str = "GET", path: str = "/stream", **headers: str) -> str | None:
    """The code of the error that a request with these headers gets."""
    given = Headers({name.replace("_", "-"): value for name, value in headers.items()})
    try:
        pages.check(method, path, given)
    except ApiError as error:
        return error.code if error.status == 403 else f"{error.status}"
    return None


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LocalHost.:8000",
        "127.0.0.1",
        "127.0.0.1:8000",
        "127.9.9.9",
        "[::1]",
        "[::1]:8000",
    ],
)
def test_a_service_of_this_machine_answers_to_its_own_names(host: str) -> None:
    assert refusal(Pages(ApiConfig(), "127.0.0.1"), host=host) is None


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evillocalhost", ""),
        *("user@localhost", "evil.example#localhost", "localhost/evil", "localhost:x", "[::1", "127.0.0.1 evil", "a,b"),
    ],
)
@pytest.mark.parametrize("bound_to", ["127.0.0.1", "::1", "[::1]", "localhost", "127.0.1.1"])
def test_and_to_no_other(host: str, bound_to: str) -> None:
    assert refusal(Pages(ApiConfig(), bound_to), host=host) == "host_not_allowed"


def test_what_a_proxy_is_said_to_have_been_asked_for_is_not_believed() -> None:
    pages = Pages(ApiConfig(), "127.0.0.1")
    assert refusal(pages, host="evil.example", x_forwarded_host="localhost") == "host_not_allowed"


def test_each_of_two_hosts_must_be_right() -> None:
    headers = Headers(raw=[(b"host", b"localhost"), (b"host", b"evil.example")])
    with pytest.raises(ApiError):
        Pages(ApiConfig(), "127.0.0.1").check("GET", "/stream", headers)


def test_http_1_0_has_no_host() -> None:
    assert refusal(Pages(ApiConfig(), "127.0.0.1")) is None


@pytest.mark.parametrize("bound_to", ["0.0.0.0", "::", "192.0.2.7", "chat.example.org", None])
def test_a_service_for_others_answers_to_any_name(bound_to: str | None) -> None:
    assert refusal(Pages(ApiConfig(), bound_to), host="whatever.example") is None


@pytest.mark.parametrize("bound_to", ["0.0.0.0", "127.0.0.1"])
def test_names_of_the_config(bound_to: str) -> None:
    pages = Pages(ApiConfig(hosts=("Chat.example.org", "*.lan")), bound_to)
    for host in ("chat.example.org", "chat.example.org:443", "a.lan", "a.b.lan", "localhost", "127.0.0.1", "10.0.0.7"):
        assert refusal(pages, host=host) is None
    for host in ("example.org", "lan", "evillan", "evil.example", "chat.example.org.evil.example"):
        assert refusal(pages, host=host) == "host_not_allowed"
    assert refusal(Pages(ApiConfig(hosts=("*",)), bound_to), host="evil.example") is None


@pytest.mark.parametrize("host", ["http://a.example", "a.example:8000", "a*.example", "a..example", ""])
def test_a_host_that_no_request_can_name_is_refused_in_the_config(host: str) -> None:
    with pytest.raises(ValidationError, match="not a host's name"):
        ApiConfig(hosts=(host,))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize("bound_to", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": EVIL, "sec_fetch_site": "cross-site"},
        {"origin": EVIL},  # a browser without Sec-Fetch, or a service that is not "trustworthy" for want of TLS
        {"origin": "null"},  # a sandboxed frame, a file
        {"origin": "http://[::1"},  # no browser's
        {"origin": "http://localhost:x"},
        {"origin": PAGE, "sec_fetch_site": "same-site"},
        {"origin": "http://localhost"},  # another port of this machine
        {"origin": "https://localhost:8000.evil.example"},
        {"origin": "chrome-extension://localhost:8000"},
        {"sec_fetch_site": "cross-site"},  # an image, a script: no Origin
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "cross-site", "origin": "http://localhost:8000"},  # came by way of another site
        {"sec_fetch_site": "something new"},
    ],
)
def test_a_page_of_another_site_is_refused(bound_to: str, headers: dict[str, str]) -> None:
    assert refusal(Pages(ApiConfig(), bound_to), host="localhost:8000", **headers) == "origin_not_allowed"


@pytest.mark.parametrize(
    ("host", "headers"),
    [
        ("localhost:8000", {"origin": "http://localhost:8000", "sec_fetch_site": "same-origin"}),
        ("localhost:8000", {"sec_fetch_site": "same-origin"}),
        ("localhost:8000", {"sec_fetch_site": "none"}),  # typed by the user
        ("localhost:8000", {"origin": "http://localhost:8000"}),
        ("LOCALHOST:8000", {"origin": "http://localhost:8000"}),
        ("127.0.0.1", {"origin": "http://127.0.0.1"}),
        ("[::1]:8000", {"origin": "http://[::1]:8000"}),
        ("localhost:443", {"origin": "https://localhost"}),  # TLS that ends before us
        ("127.0.0.1:8000", {"origin": "https://chat.example.org", "sec_fetch_site": "same-origin"}),  # a proxy between
        ("localhost:8000", {}),  # curl
        ("localhost:8000", {"sec_fetch_mode": "cors"}),  # node's fetch
    ],
)
def test_our_own_pages_and_programs_may_call(host: str, headers: dict[str, str]) -> None:
    assert refusal(Pages(ApiConfig(), "127.0.0.1"), host=host, **headers) is None


@pytest.mark.parametrize(
    ("path", "how", "code"),
    [
        ("/", LINK, None),
        ("/ready", LINK, None),
        ("/", FRAME, "origin_not_allowed"),
        ("/ready", FETCH, "origin_not_allowed"),
        ("/ready", IMAGE, "origin_not_allowed"),
        ("/stream", LINK, "origin_not_allowed"),
        ("/v1/models", LINK, "origin_not_allowed"),
    ],
)
def test_a_link_leads_to_a_page_but_generates_nothing(path: str, how: dict[str, str], code: str | None) -> None:
    headers = {"host": "localhost:8000", "sec-fetch-site": "cross-site", **how}
    named = {name.replace("-", "_"): value for name, value in headers.items()}
    assert refusal(Pages(ApiConfig(), "127.0.0.1"), "GET", path, **named) == code
    assert refusal(Pages(ApiConfig(), "127.0.0.1"), "POST", path, **named) == "origin_not_allowed"


@pytest.mark.parametrize("origins", [(PAGE,), ("*",)])
@pytest.mark.parametrize("site", ["same-site", "cross-site"])
def test_pages_that_the_config_names_may_call(origins: tuple[str, ...], site: str) -> None:
    pages = Pages(ApiConfig(cors_origins=origins), "127.0.0.1")
    assert refusal(pages, host="localhost:8000", origin=PAGE, sec_fetch_site=site) is None
    refused = refusal(pages, host="localhost:8000", origin=EVIL, sec_fetch_site=site)
    assert refused == (None if origins == ("*",) else "origin_not_allowed")


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        # what <img>, <form> and EventSource of a foreign page send without a preflight
        ("GET", "/stream?prompt=Hi", {"sec-fetch-site": "cross-site", **IMAGE}),
        ("GET", "/stream?prompt=Hi", {"origin": EVIL}),
        ("POST", "/stream", {"origin": EVIL, "content-type": "text/plain"}),
        ("POST", "/v1/chat/completions", {"origin": EVIL, "content-type": "text/plain"}),
        ("POST", "/stream/", {"origin": "null"}),
        ("GET", "/stream?prompt=Hi", {"host": "evil.example:8000"}),
        ("POST", "/stream", {"host": "evil.example:8000", "origin": "http://evil.example:8000"}),
        ("GET", "/health", {"host": "evil.example:8000"}),
        ("GET", "/nothing", {"host": "evil.example:8000"}),
    ],
)
async def test_nothing_is_generated_for_a_page_of_another_site(
    replica: FakeReplica, make_app: MakeApp, http: Any, method: str, path: str, headers: dict[str, str]
) -> None:
    client: httpx.AsyncClient = http(make_app(replica, bound_to="127.0.0.1"))
    sent = {"host": "localhost:8000", **headers}
    response = await client.request(method, path, headers=sent, json=HI if method == "POST" else None)
    assert response.status_code == 403
    assert response.json()["error"]["code"] in ("origin_not_allowed", "host_not_allowed")
    assert response.headers["x-request-id"]
    assert "access-control-allow-origin" not in response.headers
    assert replica.requests == []


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", None])
async def test_curl_goes_on_working(
    replica: FakeReplica, make_app: MakeApp, http: Any, content_type: str | None
) -> None:
    client: httpx.AsyncClient = http(make_app(replica, bound_to="127.0.0.1"))
    headers = {"host": "127.0.0.1:8000", **({"content-type": content_type} if content_type else {})}
    response = await client.post("/stream", content=b'{"prompt": "Hi"}', headers=headers)
    assert response.status_code == 200


async def test_while_it_loads_the_same_holds() -> None:
    async def stage() -> LoadStage:
        return LoadStage("loading weights")

    config = ApiConfig(cors_origins=(PAGE,))
    app = create_loading_app(stage, MemoryMetrics(), Pages(config, "127.0.0.1"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert (await client.get("/ready", headers={"host": "evil.example"})).status_code == 403
        assert (await client.get("/ready", headers={"origin": EVIL})).status_code == 403
        response = await client.post("/stream", json=HI, headers={"origin": PAGE})
        assert response.status_code == 503
        assert response.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/stream", HI, 200),
        ("POST", "/stream", {}, 400),
        ("POST", "/v1/chat/completions", {"messages": "Hi"}, 400),
        ("GET", "/v1/models", None, 200),
        ("GET", "/ready", None, 200),
        ("GET", "/nothing", None, 404),
        ("DELETE", "/stream", None, 405),
        ("OPTIONS", "/stream", None, 200),
        ("POST", "/v1/completions", {"prompt": "Hi"}, 500),
    ],
)
async def test_every_answer_can_be_read_by_a_page_that_may_call(
    replica: FakeReplica, make_app: MakeApp, http: Any, method: str, path: str, body: object, status: int
) -> None:
    if status == 500:
        replica.scripts = [says(ZeroDivisionError())]
    client: httpx.AsyncClient = http(make_app(replica, cors_origins=[PAGE, "https://chat.example.org/"]))
    response = await client.request(method, path, json=body, headers={"origin": PAGE})
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == PAGE
    assert response.headers["vary"] == "Origin"
    exposed = set(response.headers["access-control-expose-headers"].split(", "))
    assert {"x-request-id", "retry-after"} <= exposed
    for_clients = {name for name in response.headers if name.startswith("x-")} - {"x-accel-buffering"}
    assert for_clients <= exposed, "openai's client in a browser reads x-should-retry"
    without = await client.request(method, path, json=body)
    assert "access-control-allow-origin" not in without.headers
    assert without.headers["vary"] == "Origin"  # or a cache would hand this answer to the page


async def test_a_refused_header_too(replica: FakeReplica, make_app: MakeApp, http: Any) -> None:
    client: httpx.AsyncClient = http(make_app(replica, cors_origins=["*"]))
    response = await client.post("/stream", json=HI, headers={"origin": PAGE, "x-request-disconnect-disabled": "?1"})
    assert response.status_code == 400
    assert response.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("path", ["/stream", "/v1/chat/completions/", "/nothing"])
async def test_a_browser_asks_first(replica: FakeReplica, make_app: MakeApp, http: Any, path: str) -> None:
    client: httpx.AsyncClient = http(make_app(replica, cors_origins=[PAGE], bound_to="127.0.0.1"))
    asks = {
        "host": "localhost:8000",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type, authorization",
        "access-control-request-private-network": "true",
    }
    response = await client.options(path, headers={**asks, "origin": PAGE, "sec-fetch-site": "same-site"})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert response.headers["access-control-allow-headers"] == "content-type, authorization"
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-private-network"] == "true"
    assert response.headers["x-request-id"]
    refused = await client.options(path, headers={**asks, "origin": EVIL})
    assert refused.status_code == 403
    assert not [name for name in refused.headers if name.startswith("access-control")]


async def test_without_origins_in_the_config_no_page_is_told_anything(api: httpx.AsyncClient) -> None:
    response = await api.get("/health", headers={"origin": "http://test"})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers
    assert "vary" not in response.headers


async def test_a_prefix_hides_no_path(replica: FakeReplica, make_app: MakeApp) -> None:
    """Serve's route prefix stands before every path: a link to /app/stream generates nothing either."""
    headers = {"host": "localhost", "sec-fetch-site": "cross-site", **LINK}
    exchange = Exchange(make_app(replica), "GET", "/app/stream?prompt=Hi", headers=headers)
    exchange._scope["root_path"] = "/app"
    await exchange.end()
    assert exchange.status == 403
