"""The page and its files over HTTP: compressed, kept by the browser, open without a key, and nothing else is."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from api_keys import entry, guard_of
from page_server import PageServer

from serve_app.access.keys import new_key
from serve_app.api.http.chat_page import _page_content

MOST_BYTES = 150_000
ROOT = Path(__file__).parents[2]


def files_of(url: str) -> list[str]:
    """URLs of every file that the page can load."""
    text = httpx.get(url).text
    base = re.search(r'href="(/ui/[0-9a-f]{16})/', text)
    assert base is not None
    ui = ROOT / "serve_app" / "ui"
    names = [path for folder in ("chat", "vendor") for path in sorted((ui / folder).rglob("*"))]
    return [f"{url}{base[1]}/{path.relative_to(ui)}" for path in names if path.suffix in (".js", ".css", ".svg")]


def test_all_of_it_is_small_over_the_wire(server: PageServer) -> None:
    total = 0
    with httpx.Client(headers={"accept-encoding": "gzip"}) as client:
        for url in (server.url, *files_of(server.url)):
            with client.stream("GET", url) as answer:
                assert answer.status_code == 200, url
                assert answer.headers["content-encoding"] == "gzip"
                total += sum(len(piece) for piece in answer.iter_raw())
    assert total < MOST_BYTES


def test_files_are_kept_under_their_version_and_checked_under_another(server: PageServer) -> None:
    url = files_of(server.url)[0]
    first = httpx.get(url)
    assert "immutable" in first.headers["cache-control"]
    assert first.headers["x-content-type-options"] == "nosniff"
    again = httpx.get(url, headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = httpx.get(re.sub("/ui/[0-9a-f]{16}", f"/ui/{'0' * 16}", url))
    assert (other.status_code, other.headers["cache-control"]) == (200, "no-cache")


@pytest.mark.parametrize(
    ("accepted", "encoding"), [("gzip", "gzip"), ("br, gzip;q=0.5", "gzip"), ("identity", None), ("gzip;q=0", None)]
)
def test_the_page_is_compressed_for_those_who_read_that(
    server: PageServer, accepted: str, encoding: str | None
) -> None:
    with httpx.stream("GET", server.url, headers={"accept-encoding": accepted}) as answer:
        assert answer.headers.get("content-encoding") == encoding
        assert answer.headers["vary"] == "accept-encoding"
        raw = b"".join(answer.iter_raw())
    assert b"<!DOCTYPE html>" in (gzip.decompress(raw) if encoding else raw)


def test_the_policy_allows_nothing_but_the_page_itself(server: PageServer) -> None:
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "style=" not in answer.text
    assert re.findall(r"<script(?! type=\"module\" src=)", answer.text) == []


def test_other_names_are_not_served(server: PageServer) -> None:
    base = files_of(server.url)[0].rpartition("/chat/")[0]
    for name in (
        "vendor/manifest.json",
        "chat/index.html",
        "swagger/swagger-ui.css",
        "..%2freference.js",
    ):
        answer = httpx.get(f"{base}/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), name


def test_the_page_obeys_the_rule_for_hosts(server: PageServer) -> None:
    answer = httpx.get(server.url, headers={"host": "evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")


def test_exactly_the_files_are_open_where_keys_are_asked_for(
    start_server: Callable[..., PageServer], tmp_path: Path
) -> None:
    server = start_server(guard=guard_of(tmp_path / "keys.yaml", entry("alice", new_key())))
    urls = [server.url, *files_of(server.url)]
    assert all(httpx.get(url).status_code == 200 for url in urls)
    assert all(httpx.post(url).status_code == 401 for url in urls[:2])
    base = urls[1].rpartition("/chat/")[0]
    for path in ("vendor/manifest.json", "chat/index.html", "chat/../../../v1/models", "nothing.js"):
        assert httpx.get(f"{base}/{path}").status_code == 401, path
    assert httpx.get(f"{server.url}/ready").status_code == 401


def test_it_works_below_a_prefix() -> None:
    text = _page_content("/chat").plain.decode()
    assert 'data-root="/chat"' in text
    assert set(re.findall(r'(?:src|href)="(/[^/"]*)', text)) == {"/chat"}
