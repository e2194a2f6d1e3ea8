"""The playground in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import pytest

from headstart import page as house

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright to test the playground")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
HTML = files("headstart.serving").joinpath("playground.html").read_text(encoding="utf-8")
NOWHERE = "http://playground.test/"
"""Where the page lies in tests that need no server: the browser is answered by the test."""
MODELS = {"object": "list", "data": [{"id": "some-model", "object": "model", "heads": 3}]}
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium, or name one in CHROMIUM"
)


def events(*chunks: dict[str, Any], done: bool = True) -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ("data: [DONE]\n\n" if done else "")


def chunk(*tokens: tuple[str, int], tokens_per_pass: float = 1.0) -> dict[str, Any]:
    parts = [{"text": text, "head": head} for text, head in tokens]
    text = "".join(text for text, _ in tokens)
    speculative = {"tokens": parts, "tokens_per_pass": tokens_per_pass}
    return {"choices": [{"index": 0, "text": text, "speculative": speculative}]}


def usage(tokens: int, *positions: tuple[int, int, int]) -> dict[str, Any]:
    per_position = [{"head": head, "drafted": drafted, "accepted": accepted} for head, drafted, accepted in positions]
    return {"choices": [], "usage": {"completion_tokens": tokens, "speculative": {"per_position": per_position}}}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Root has no sandbox; what runs here is this repository's.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A page of the width of a phone, that lets nothing wrong pass."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(10_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.wrong = wrong
    yield page
    context.close()
    # A browser logs answers other than 200, and pages that are gone, whatever a page does with them.
    assert [line for line in wrong if not line.startswith("Failed to load resource")] == []


Answer = Callable[[Any], None]


def opened(tab: Any, answer: Answer | None = None) -> Any:
    """The page, asking nobody but the test."""
    tab.route(NOWHERE, lambda route: route.fulfill(body=HTML, content_type="text/html; charset=utf-8"))
    tab.route(NOWHERE + "v1/models", lambda route: route.fulfill(json=MODELS))
    if answer is not None:
        tab.route(NOWHERE + "v1/completions", answer)
    tab.goto(NOWHERE)
    playwright.expect(tab.locator("#model")).to_have_text("some-model · 3 heads")
    return tab


def streamed(*chunks: dict[str, Any], done: bool = True) -> Answer:
    return lambda route: route.fulfill(body=events(*chunks, done=done), content_type="text/event-stream")


def written(tab: Any, panel: int = 0) -> list[tuple[str, int]]:
    """(text, head) of each coloured piece."""
    read = "spans => spans.map(span => [span.textContent, Number(span.dataset.head)])"
    return [tuple(pair) for pair in tab.locator(".text").nth(panel).locator("[data-head]").evaluate_all(read)]


def press(tab: Any, name: str) -> None:
    tab.get_by_role("button", name=name).click()


def test_the_page_runs_its_own_script_alone() -> None:
    script = re.findall(r"<script>(.*?)</script>", HTML, re.S)
    assert len(script) == 1
    right = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{right}'" in HTML, f"the script has changed; its hash is now sha256-{right}"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bon\w+=", HTML)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    assert re.findall(r"https?://[^\s'\"]+", HTML) == ["http://www.w3.org/2000/svg"]
    assert "url(" not in HTML and "@import" not in HTML


def test_heads_have_the_colours_of_the_reports() -> None:
    light, dark = re.findall(r"--h1:.*?--h8:#\w{6}", HTML)
    for scheme, colours in ((light, house.LIGHT), (dark, house.DARK)):
        assert re.findall(r"#\w{6}", scheme) == list(colours)
    for name in ("page", "ink", "muted", "line", "panel", "alarm"):
        assert re.findall(rf"--{name}:(#\w+)", HTML) == list(house.COLOURS[name])


@needs_browser
def test_each_token_has_the_colour_and_the_name_of_its_head(tab: Any) -> None:
    tokens = [("a", 1), ("b", 2), ("c", 3), (" d", 1), ("e", 0), ("}", -1)]
    opened(tab, streamed(chunk(*tokens[:3]), chunk(*tokens[3:], tokens_per_pass=2.5), usage(6, (2, 4, 3), (3, 4, 1))))
    press(tab, "Write")
    playwright.expect(tab.locator("#status")).to_have_text("Done: 6 tokens, 2.50 a pass.")
    assert written(tab) == tokens
    classes = "spans => spans.map(span => span.className)"
    assert tab.locator("[data-head]").evaluate_all(classes) == ["h1", "h2", "h3", "h1", "found", "forced"]
    colour = "span => getComputedStyle(span).backgroundColor"
    tints = [tab.locator(f'.text [data-head="{head}"]').first.evaluate(colour) for head in (1, 2, 3)]
    assert len(set(tints)) == 3
    legend = tab.locator("#legend button")
    assert legend.all_text_contents() == ["head 1 (no draft)", "head 2", "head 3", "forced", "looked up"]
    rows = tab.locator(".bars tr")
    assert rows.evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.textContent))") == [
        ["head 2", "", "75 %", "3 of 4"],
        ["head 3", "", "25 %", "1 of 4"],
    ]
    # Not by colour alone: one head at a time, and its name on each token.
    legend.nth(2).press("Enter")
    assert tab.locator("[data-head]").evaluate_all(classes) == ["", "", "h3", "", "", ""]
    assert legend.nth(2).get_attribute("aria-pressed") == "true"
    assert tab.locator('.text [data-head="3"]').get_attribute("title") == "head 3"


@needs_browser
def test_what_a_model_writes_is_text(tab: Any) -> None:
    bad = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\x1b[31m"
    opened(tab, streamed(chunk((bad, 1)), usage(1)))
    tab.locator("#prompt").fill(bad[:-5])
    press(tab, "Write")
    playwright.expect(tab.locator("#status")).to_contain_text("Done")
    assert written(tab) == [(bad.replace("\x1b", "\N{SYMBOL FOR ESCAPE}"), 1)]
    assert tab.locator("#output img, #output script").count() == 0
    assert tab.evaluate("() => window.hacked") is None


@needs_browser
@pytest.mark.parametrize(
    ("answer", "line"),
    [
        pytest.param(
            lambda route: route.fulfill(status=429, headers={"retry-after": "7"}, json={"error": {"message": "full"}}),
            "The server is busy. Try again in 7 s.",
            id="busy",
        ),
        pytest.param(lambda route: route.abort(), "The server does not answer. Is it still running?", id="gone"),
        pytest.param(
            lambda route: route.fulfill(status=400, json={"error": {"message": "max_tokens is too much"}}),
            "max_tokens is too much",
            id="refused",
        ),
        pytest.param(
            lambda route: route.fulfill(status=502, body="<html>Bad gateway</html>"),
            "The server answers with status 502.",
            id="gateway",
        ),
        pytest.param(
            streamed(chunk(("half", 1)), done=False), "The connection broke before the text was complete.", id="broken"
        ),
        pytest.param(
            streamed(chunk(("half", 1)), {"error": {"message": "the server is stopping"}}),
            "the server is stopping",
            id="stopping",
        ),
    ],
)
def test_what_goes_wrong_is_told_in_a_line(tab: Any, answer: Answer, line: str) -> None:
    opened(tab, answer)
    press(tab, "Write")
    playwright.expect(tab.get_by_role("alert")).to_have_text(line)
    playwright.expect(tab.get_by_role("button", name="Write")).to_be_enabled()
    playwright.expect(tab.get_by_role("button", name="Stop")).to_be_disabled()
