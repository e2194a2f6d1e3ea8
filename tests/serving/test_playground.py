"""Test the playground in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chats import chat_tokenizer
from starlette.testclient import TestClient

from headstart.reports import html as house
from headstart.serving.routes import make_app

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright to test the playground")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
HTML = files("headstart.serving").joinpath("playground.html").read_text(encoding="utf-8")
NOWHERE = "http://playground.test/"
"""Address of the page in tests that answer the browser themselves."""
MODELS: Any = {"object": "list", "data": [{"id": "some-model", "object": "model", "heads": 3}]}
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
    playwright.expect.set_options(timeout=60_000)  # of a busy machine; nothing waits longer than it must
    with playwright.sync_playwright() as driver:
        # Root has no sandbox, and what runs here is this repository's; containers have little shared memory.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """Open a page of the width of a phone that fails on any error of the browser."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.wrong = wrong
    yield page
    context.close()
    # A browser logs answers other than 200, and pages that are gone, whatever a page does with them.
    assert [line for line in wrong if not line.startswith("Failed to load resource")] == []


Answer = Callable[[Any], None]


def opened(tab: Any, answer: Answer | None = None, chat: bool = False) -> Any:
    """Open the page with answers from the test."""
    models = {"object": "list", "data": [MODELS["data"][0] | {"chat": chat}]}
    tab.route(NOWHERE, lambda route: route.fulfill(body=HTML, content_type="text/html; charset=utf-8"))
    tab.route(NOWHERE + "v1/models", lambda route: route.fulfill(json=models))
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


def by_character(pieces: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(character, head) for text, head in pieces for character in text]


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
    playwright.expect(tab.locator("#status")).to_have_text("Done: 6 tokens, 2.50 per pass.")
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
def test_models_that_chat_are_sent_messages(tab: Any) -> None:
    sent: list[dict[str, Any]] = []

    def answer(route: Any) -> None:
        sent.append(json.loads(route.request.post_data))
        parts = {"tokens": [{"text": "Hi", "head": 1}], "tokens_per_pass": 1.0}
        one = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hi"}, "speculative": parts}]}
        route.fulfill(body=events(one, usage(1)), content_type="text/event-stream")

    opened(tab, streamed(chunk(("!", 1)), usage(1)), chat=True)
    tab.route(NOWHERE + "v1/chat/completions", answer)
    tab.locator("#prompt").fill("Hello")
    press(tab, "Write")
    playwright.expect(tab.locator("#status")).to_contain_text("Done")
    assert written(tab) == [("Hi", 1)]
    assert sent[0]["messages"] == [{"role": "user", "content": "Hello"}] and "prompt" not in sent[0]
    tab.get_by_label("As a chat").uncheck()
    press(tab, "Write")
    playwright.expect(tab.locator(".text")).to_have_text("Hello!")


def test_the_server_says_whether_its_model_chats(tmp_path: Path) -> None:
    model = SimpleNamespace(config=SimpleNamespace(heads=2))
    for template in (None, "{{ messages }}"):
        tokenizer = chat_tokenizer(tmp_path / str(template is None), template)
        service: Any = SimpleNamespace(name="m", context=8, model=model, tokenizer=tokenizer)
        card = TestClient(make_app(service)).get("/v1/models").json()["data"][0]
        assert card["chat"] is (template is not None)


@needs_browser
def test_output_is_shown_as_text_only(tab: Any) -> None:
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
def test_errors_are_shown_in_one_line(tab: Any, answer: Answer, line: str) -> None:
    opened(tab, answer)
    press(tab, "Write")
    playwright.expect(tab.get_by_role("alert")).to_have_text(line)
    playwright.expect(tab.get_by_role("button", name="Write")).to_be_enabled()
    playwright.expect(tab.get_by_role("button", name="Stop")).to_be_disabled()


@needs_browser
def test_a_key_is_requested_and_kept_in_the_tab(tab: Any) -> None:
    asked: list[str | None] = []

    def models(route: Any) -> None:
        asked.append(route.request.headers.get("authorization"))
        if asked[-1] == "Bearer right":
            route.fulfill(json=MODELS)
        else:
            route.fulfill(status=401, json={"error": {"message": "no"}})

    tab.route(NOWHERE, lambda route: route.fulfill(body=HTML, content_type="text/html; charset=utf-8"))
    tab.route(NOWHERE + "v1/models", models)
    tab.goto(NOWHERE)
    alert, key = tab.get_by_role("alert"), tab.get_by_label("API key")
    playwright.expect(alert).to_have_text("The server requires an API key.")
    playwright.expect(key).to_be_focused()
    key.fill("wrong")
    key.press("Enter")
    playwright.expect(alert).to_have_text("The server does not accept this API key.")
    key.fill("right")
    key.press("Enter")
    playwright.expect(tab.locator("#model")).to_contain_text("some-model")
    playwright.expect(key).to_be_hidden()
    playwright.expect(alert).to_be_hidden()
    assert asked == [None, "Bearer wrong", "Bearer right"]
    kept = tab.evaluate("() => [Object.values(sessionStorage), localStorage.length, document.cookie]")
    assert kept == [["right"], 0, ""]


@needs_browser
def test_a_race_reports_the_first_difference(tab: Any) -> None:
    def answer(route: Any) -> None:
        body = json.loads(route.request.post_data)
        if not body["stream"]:
            route.fulfill(json={})
            return
        word = "same" if not body["speculative"]["enabled"] else "sane"
        streamed(chunk((word, 1)), usage(1))(route)

    opened(tab, answer)
    press(tab, "Race")
    playwright.expect(tab.locator("#verdict")).to_contain_text("✗ The outputs differ from character 3 on.")


def settings_of(tab: Any, **values: object) -> None:
    for name, value in values.items():
        tab.locator(f"#{name}").fill(str(value))


def width(tab: Any) -> int:
    return tab.evaluate("() => document.documentElement.scrollWidth")


@needs_browser
def test_a_race_shows_the_servers_output_twice(tab: Any, server: Any) -> None:
    prompt = "class Stack:\n    def push(self, item):\n"
    fields = {"max_tokens": 80, "temperature": 0.9, "top_p": 0.95, "seed": 5}
    assert tab.goto(server.url).header_value("content-security-policy") == "frame-ancestors 'none'"
    settings_of(tab, prompt=prompt, **fields)
    tab.get_by_label("Heads").select_option("all 8")  # what "automatic" takes is a matter of time
    tab.locator("#prompt").press("Control+Enter")
    status = tab.locator("#status")
    playwright.expect(status).to_contain_text("Done: 80 tokens")
    request = urllib.request.Request(
        server.url + "/v1/completions",
        json.dumps({"prompt": prompt, "speculative": {"heads": 8, "origins": True}, **fields}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        choice = json.load(response)["choices"][0]
    # By character: how many passes come in one piece is a matter of time, and tokens of one head then stand together.
    shown = by_character(written(tab))
    assert "".join(text for text, _ in shown) == choice["text"]
    assert shown == by_character([(part["text"], part["head"]) for part in choice["speculative"]["tokens"]])
    assert {head for _, head in shown} > {1, 2}
    assert tab.locator(".bars tr").count() == 7
    assert width(tab) == 390

    press(tab, "Race")
    playwright.expect(tab.locator("#verdict")).to_contain_text("✓ Identical outputs (80 tokens)")
    plain, speculative = by_character(written(tab, 0)), by_character(written(tab, 1))
    assert {head for _, head in plain} == {1}
    assert "".join(text for text, _ in plain) == choice["text"]
    assert speculative == shown
    press(tab, "Replay")
    playwright.expect(status).to_have_text("Replaying …")
    tab.keyboard.press("Escape")
    playwright.expect(status).to_have_text("Done.")
    assert by_character(written(tab, 0)) == plain and by_character(written(tab, 1)) == shown
    assert width(tab) == 390


@needs_browser
def test_stop_frees_the_slot(tab: Any, server: Any, slow_steps: Callable[[float], None]) -> None:
    worker = server.service.worker
    slow_steps(0.02)
    tab.goto(server.url)
    settings_of(tab, max_tokens=480)
    tab.get_by_label("Speculate").uncheck()
    press(tab, "Write")
    tab.locator(".text [data-head]").nth(3).wait_for()
    tab.evaluate("document.querySelector('#panels').style.paddingBottom = '3000px'; scrollTo(0, 2500)")
    assert tab.evaluate("scrollY") == 2500
    playwright.expect(tab.get_by_role("button", name="Stop")).to_be_in_viewport(ratio=1)
    press(tab, "Stop")
    playwright.expect(tab.locator("#status")).to_have_text("Stopped.")
    playwright.expect(tab.get_by_role("alert")).to_be_hidden()
    for _ in range(200):
        if worker.idle:
            break
        time.sleep(0.02)
    assert worker.idle
    assert 3 < len(written(tab)) < 400
