"""The page that shows the OpenAPI document: whole without a network."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from importlib.resources import files

import httpx
import pytest
from fake_replica import FakeReplica
from starlette.applications import Starlette

VENDORED = {
    "swagger-ui-bundle.js": "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2",
    "swagger-ui.css": "5ed08757e53da3e026d6cbecc61fe5d43585c9560b302d534ad56692519a273d",
    "favicon-32x32.png": "3ed612f41e050ca5e7000cad6f1cbe7e7da39f65fca99c02e99e6591056e5837",
    "LICENSE": "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
    "NOTICE": "0d20d1adef18aee3f40dd258172155521ce702ac445cb5f7b7d60ed32dad2fb2",
    "swagger-ui-bundle.js.LICENSE.txt": "37eb6e7e59aed57b2c1acf076574b818ea07b74265717e0bd67b59e0baf9abbb",
}
"""File of swagger-ui-dist 5.35.0 -> its SHA-256."""


@pytest.mark.parametrize("name", VENDORED)
def test_the_files_of_others_are_unchanged(name: str) -> None:
    content = files("serve_app.ui").joinpath("swagger", name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == VENDORED[name]


async def test_the_page_loads_only_what_the_service_has(api: httpx.AsyncClient) -> None:
    page = await api.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    needed = re.findall(r'(?:src|href|data-document)="([^"]+)"', page.text)
    assert len(needed) == 5
    for path in needed:
        answer = await api.get(path)
        assert answer.status_code == 200, path
        assert answer.content


async def test_it_works_below_a_prefix(make_app: Callable[..., Starlette], replica: FakeReplica) -> None:
    transport = httpx.ASGITransport(make_app(replica), root_path="/chat")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        page = (await client.get("/chat/docs")).text
    assert 'src="/chat/docs/reference.js"' in page
    assert 'data-document="/chat/openapi.json"' in page


async def test_other_files_are_not_served(api: httpx.AsyncClient) -> None:
    for name in ("nothing.js", "LICENSE", "..%2f__init__.py"):
        answer = await api.get(f"/docs/{name}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
