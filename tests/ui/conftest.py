"""A server for each test, and a browser for those that need one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from page_server import PageServer, page_server

from serve_app.chat.tokenizer import ChatTokenizer

CHROMIUM = Path("/usr/bin/chromium")
StartServer = Callable[..., PageServer]


@pytest.fixture
def start_server(tokenizer: ChatTokenizer, tokenizer_folder: Path) -> Iterator[StartServer]:
    """start_server(guard=..., **fields of ApiConfig)."""
    with ExitStack() as servers:
        yield lambda **how: servers.enter_context(page_server(tokenizer, tokenizer_folder, **how))


@pytest.fixture
def server(start_server: StartServer) -> PageServer:
    """One without keys."""
    return start_server()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, headless. Playwright keeps an event loop running meanwhile, beside which no async test can."""
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is absent: install the package chromium to run the chat page's tests")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def context(chromium: Any) -> Iterator[Any]:
    """A new profile, in which any request to another host, and any script error, fails the test."""
    made = chromium.new_context(viewport={"width": 1280, "height": 800})
    made.set_default_timeout(15_000)
    wrong: list[str] = []
    made.on("weberror", lambda error: wrong.append(str(error.error)))
    made.on("request", lambda request: wrong.append(request.url) if _is_foreign(request.url) else None)
    yield made
    made.close()
    assert wrong == []


def _is_foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "blob:", "data:"))


@pytest.fixture
def page(context: Any, server: PageServer) -> Any:
    """The chat page, loaded."""
    made = context.new_page()
    made.goto(server.url)
    return made
