"""The chat page in a real browser: what a reader sees and does, and what happens when something fails."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api_keys import entry, guard_of
from page_server import PageServer

from serve_app.access.keys import new_key
from serve_app.core import Failure, FailureCode

LONG = " ".join(f"word{number}" for number in range(60)) + "."
ANSWER = ".message.assistant"
TEXT = f"{ANSWER} .text"


def ask(page: Any, text: str = "Hi") -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def ended(page: Any, timeout_s: float = 20) -> str:
    """The text of the last answer, once it has ended."""
    last = page.locator(ANSWER).last
    last.locator("article[aria-busy=false]").wait_for(timeout=timeout_s * 1000)
    text: str = last.locator(".text").inner_text()
    return text.strip()


def eventually(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Wait until it holds, of what happens in the server's thread."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def begun(page: Any, words: int = 5) -> None:
    """Wait for the beginning of `LONG`."""
    page.locator(TEXT).last.filter(has_text=f"word{words}").wait_for()


def test_tokens_are_seen_one_after_the_other(page: Any, server: PageServer) -> None:
    server.model.text, server.model.pause_s = LONG, 0.02
    page.evaluate(
        """() => {
          window.seen = new Set()
          const look = () => {
            const text = document.querySelector('.message.assistant .text')?.innerText
            if (text) window.seen.add(text.length)
            requestAnimationFrame(look)
          }
          look()
        }"""
    )
    ask(page)
    assert ended(page) == LONG
    assert page.evaluate("window.seen.size") > 20
    facts = page.locator(f"{ANSWER} .speed").inner_text()
    assert re.fullmatch(r"first token after [\d.]+ s · [\d.]+ tokens/s · \d+ tokens", facts)


def test_stopping_ends_the_work(page: Any, server: PageServer) -> None:
    server.model.text, server.model.pause_s = LONG, 0.05
    ask(page)
    begun(page)
    page.keyboard.press("Escape")
    text = ended(page)
    assert LONG.startswith(text)
    assert text != LONG
    page.locator(ANSWER).get_by_text("Stopped.").wait_for()
    eventually(lambda: (server.replica.cancelled, server.replica.closed) == (1, 1))


def test_a_reload_in_the_middle_continues_the_answer(page: Any, server: PageServer) -> None:
    server.model.text, server.model.pause_s = LONG, 0.03
    ask(page)
    begun(page, 12)
    page.reload()
    assert ended(page) == LONG
    page.get_by_text("Page opened again: continued after").wait_for()
    assert len(server.model.requests) == 1


def test_a_lost_replica_changes_nothing_but_a_line(page: Any, server: PageServer) -> None:
    server.model.text, server.model.pause_s, server.model.dies_after = LONG, 0.02, 40
    ask(page)
    assert ended(page) == LONG
    page.get_by_text(re.compile(r"Continued on another replica after [\d.]+ s\.")).wait_for()
    assert len(server.model.requests) == 2


def test_a_cut_connection_is_made_again(page: Any, server: PageServer) -> None:
    server.model.text, server.model.pause_s = LONG, 0.03
    ask(page)
    begun(page)
    server.cut()
    assert ended(page) == LONG
    page.get_by_text(re.compile(r"Connection lost: continued after [\d.]+ s\.")).wait_for()
    assert len(server.model.requests) == 1


def test_a_browser_without_a_network_continues_when_it_is_back(context: Any, page: Any, server: PageServer) -> None:
    server.model.text, server.model.pause_s = LONG, 0.03
    ask(page)
    begun(page)
    context.set_offline(True)
    server.cut()
    page.locator(ANSWER).get_by_text("Connection lost. Reconnecting…").wait_for()
    context.set_offline(False)
    assert ended(page) == LONG


def test_an_error_says_what_happened_and_what_to_do(page: Any, server: PageServer) -> None:
    server.model.failure = Failure(FailureCode.ENGINE_FAILED, "The engine has stopped.")
    ask(page)
    page.locator(f"{ANSWER} .failure").filter(has_text="engine_failed").wait_for()
    server.model.failure = None
    page.get_by_role("button", name="Try again").click()
    assert ended(page) == server.model.text
    page.get_by_label("Version 2 of 2").wait_for()


HOSTILE = """<script>window.bad = 1</script><img src=x onerror="window.bad = 1">

<svg onload="window.bad = 1"></svg><iframe src="javascript:parent.bad = 1"></iframe>

[link](javascript:window.bad=1) [data](data:text/html,<script>bad=1</script>) ![picture](http://evil.example/a.png)

<a href="http://evil.example" onclick="window.bad=1" style="position:fixed;inset:0">cover</a>

<style>body { display: none }</style><form action="http://evil.example"><input name=q></form>

```<img src=x onerror=window.bad=1>
<script>window.bad = 1</script>
```

| a | b |
| --- | --- |
| <math><mi//xlink:href="data:x,<script>bad=1</script>"> | `<b onmouseover=bad=1>` |
"""


def test_hostile_markdown_is_harmless(page: Any, server: PageServer) -> None:
    server.model.text = HOSTILE
    ask(page, HOSTILE)
    ended(page)
    # An image that fails: what else failed before it has told its handlers by then.
    page.evaluate("new Promise((told) => Object.assign(new Image(), { onerror: told }).src = 'data:,')")
    assert page.evaluate("window.bad") is None
    inside = page.locator(TEXT)
    for tag in ("script", "img", "svg", "iframe", "style", "form", "input", "math", "object"):
        assert inside.locator(tag).count() == 0, tag
    attributes = inside.evaluate("e => [...e.querySelectorAll('*')].flatMap(x => x.getAttributeNames())")
    assert not [name for name in attributes if name.startswith("on") or name == "style"]
    hrefs = inside.evaluate("e => [...e.querySelectorAll('a')].map(a => [a.getAttribute('href'), a.rel])")
    assert all(href is None or href.startswith("http") for href, _ in hrefs)
    assert "noopener" in hrefs[-1][1]


def test_markdown_and_code_are_shown(page: Any, server: PageServer) -> None:
    server.model.text = (
        "# Title\n\nSome **bold** text.\n\n- one\n- two\n\n```python\ndef f(x):\n    return x + 1\n```\n"
    )
    ask(page)
    ended(page)
    text = page.locator(TEXT)
    text.locator("h1", has_text="Title").wait_for()
    assert text.locator("strong").inner_text() == "bold"
    assert text.locator("li").count() == 2
    text.locator("pre .hljs-keyword", has_text="def").wait_for()


def test_blocks_of_a_long_answer_are_rendered_once(page: Any, server: PageServer) -> None:
    """Otherwise each token of a long answer would cost more than the one before it."""
    block = "Some text of a paragraph, with `code` and **bold** words.\n\n- a point\n- another point\n\n"
    server.model.text, server.model.pause_s = block * 300, 0.0005
    assert len(server.model.tokenizer.encode_text(server.model.text, add_bos=False, parse_special=False)) > 8000
    ask(page)
    points = page.locator(f"{TEXT} li")
    points.nth(50).wait_for(timeout=60_000)
    page.evaluate("window.early = [...document.querySelectorAll('.message.assistant .part')].slice(0, 20)")
    points.nth(400).wait_for(timeout=120_000)
    assert page.evaluate("window.early.length === 20 && window.early.every((part) => part.isConnected)")
    ended(page, timeout_s=120)
    assert points.count() == 600


def test_two_tabs_show_the_same_answer_once(context: Any, page: Any, server: PageServer) -> None:
    server.model.text, server.model.pause_s = LONG, 0.05
    ask(page)
    begun(page)
    other = context.new_page()
    other.goto(server.url)
    begun(other, 15)
    page.close()  # the other one takes over
    assert ended(other) == LONG
    assert len(server.model.requests) == 1


def test_editing_and_regenerating_make_branches(page: Any, server: PageServer) -> None:
    server.model.text = "First."
    ask(page, "One")
    ended(page)
    server.model.text = "Second."
    page.get_by_role("button", name="Regenerate").click()
    page.locator(TEXT, has_text="Second.").wait_for()
    page.get_by_role("button", name="Earlier version").click()
    page.locator(TEXT, has_text="First.").wait_for()
    page.get_by_role("button", name="Edit").click()
    server.model.text = "Third."
    page.get_by_label("Edit the message").fill("Two")
    page.locator(".edit").get_by_role("button", name="Send").click()
    page.locator(TEXT, has_text="Third.").wait_for()
    page.locator(".message.user").get_by_label("Version 2 of 2").wait_for()
    page.reload()
    page.locator(TEXT, has_text="Third.").wait_for()


def test_settings_are_sent_and_chats_are_kept(page: Any, server: PageServer) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Close").click()
    ask(page, "A first chat")
    ended(page)
    request = server.model.requests[-1]
    assert (request.sampling.temperature, request.sampling.seed) == (0.25, 7)
    brief = tuple(server.model.tokenizer.encode_text("Be brief.", add_bos=False, parse_special=False))
    prompt = tuple(request.prompt_token_ids)
    assert any(prompt[start : start + len(brief)] == brief for start in range(len(prompt)))
    page.get_by_role("button", name="New chat").click()
    ask(page, "A second chat")
    ended(page)
    page.reload()
    page.get_by_role("navigation").get_by_role("button", name="A first chat").click()
    page.locator(".message.user", has_text="A first chat").wait_for()
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Temperature").input_value() == "0.25"
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export as JSON").click()
    document = json.loads(Path(saved.value.path()).read_text())
    assert [message["role"] for message in document["messages"]] == ["user", "assistant"]


def test_probabilities_are_shown(page: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Ask for the probability of each token").check()
    page.get_by_role("button", name="Close").click()
    ask(page)
    ended(page)
    page.get_by_role("button", name="Show probabilities").click()
    page.locator(".tokens span").nth(1).hover()
    assert "%" in page.locator(".tip").inner_text()


def test_the_card_says_what_the_model_is(page: Any) -> None:
    page.get_by_role("button", name="tiny").click()
    facts = page.locator("#card-facts").inner_text()
    assert "32,768 tokens" in facts
    assert "Exact" in facts


def test_a_key_is_asked_for_once_and_can_be_forgotten(
    context: Any, start_server: Callable[..., PageServer], tmp_path: Path
) -> None:
    key = new_key()
    server = start_server(guard=guard_of(tmp_path / "keys.yaml", entry("alice", key)))
    page = context.new_page()
    page.goto(server.url)
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Key", exact=True).fill("sa-wrong")
    dialog.get_by_role("button", name="Use this key").click()
    page.get_by_text("That key was not accepted.").wait_for()
    dialog.get_by_label("Key", exact=True).fill(key)
    dialog.get_by_role("button", name="Use this key").click()
    ask(page)
    assert ended(page) == server.model.text
    page.reload()
    page.get_by_role("button", name="tiny").wait_for()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Forget the key").click()
    assert page.evaluate("localStorage.getItem('serve_app.key')") is None


def test_the_first_paint_waits_for_no_script(context: Any, server: PageServer) -> None:
    page = context.new_page()
    page.route("**/*.js", lambda route: route.abort())
    page.goto(server.url)
    page.wait_for_function("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    page.get_by_role("button", name="New chat").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(context: Any, server: PageServer, scheme: str, width: int) -> None:
    server.model.text = (
        f"# Title\n\n{'x' * 400}\n\n```\n{'y' * 400}\n```\n\n|{'a |' * 40}\n|{'-|' * 40}\n|{'b |' * 40}\n"
    )
    page = context.new_page()
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(server.url)
    ask(page)
    ended(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        "document.getElementById('scroll').scrollWidth <= document.getElementById('scroll').clientWidth"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everybody_can_use_it(context: Any, server: PageServer, scheme: str, width: int) -> None:
    """The rules of axe, for a chat with all kinds of parts and for each dialog."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    code = "```python\nx = 1  # one\n```"
    server.model.text = f"# Title\n\nText, `code`, [a link](https://example.org).\n\n{code}\n\n|a|b|\n|-|-|\n|1|2|\n"
    page = context.new_page()
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(server.url)
    page.get_by_role("button", name="tiny").wait_for()

    def check(what: str) -> None:
        found = axe.Axe().run(page)
        assert found.violations_count == 0, f"{what}: {found.generate_report()}"

    check("empty")
    page.get_by_role("button", name="Settings").click()
    check("settings")
    page.get_by_label("Ask for the probability of each token").check()
    page.get_by_role("button", name="Close").click()
    ask(page)
    ended(page)
    page.locator(f"{TEXT} .hljs-number").wait_for()
    check("an answer")
    page.get_by_role("button", name="Show probabilities").click()
    check("probabilities")
    page.get_by_role("button", name="tiny").click()
    check("card")
    page.get_by_role("button", name="Close").click()
    server.model.failure = Failure(FailureCode.ENGINE_FAILED, "The engine has stopped.")
    ask(page)
    page.locator(f"{ANSWER} .failure").last.wait_for()
    check("an error")
    if width < 760:
        page.get_by_role("button", name="Chats").click()
        check("list of chats")
