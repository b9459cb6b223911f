"""A person with a browser, real nodes, a real model: types, sees tokens arrive, loses nodes, goes on."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.e2e.conftest import MakeFleet
from tests.e2e.processes import Fleet

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
ANSWER_MS = 60_000
"""How long two busy cores may take for an answer: a limit, not a measure."""

SHORT_AND_GREEDY = {"ROUTER__DEFAULTS__TEMPERATURE": "0", "ROUTER__DEFAULTS__MAX_OUTPUT_TOKENS": "24"}
"""The page leaves both to the router."""

RECORD_ANSWER = """() => {
  window.seen = new Set();
  const look = () => window.seen.add([...document.querySelectorAll(".answer")].at(-1)?.textContent.length ?? 0);
  new MutationObserver(look).observe(document.querySelector("#conversation"), { subtree: true, childList: true });
}"""


@pytest.fixture
def page() -> Iterator[Page]:
    """A fresh browser; an error in the page's scripts fails the test."""
    if not CHROMIUM.exists():
        pytest.fail(f"There is no {CHROMIUM}: run `make system-deps`.")
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        opened = browser.new_page(locale="en-US", viewport={"width": 1200, "height": 800})
        opened.set_default_timeout(ANSWER_MS)
        opened.on("pageerror", lambda error: errors.append(str(error)))
        yield opened
        browser.close()
    assert errors == []


def ask(page: Page, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def expect_end(page: Page) -> None:
    """The newest answer ends whole, or at its length limit."""
    newest = page.locator(".exchange").last
    expect(newest).to_have_attribute("data-status", re.compile("^(done|incomplete)$"), timeout=ANSWER_MS)


def answering_node(page: Page, fleet: Fleet) -> str:
    """The node that the newest answer's badge names first."""
    badge = page.locator(".meta .node").last.inner_text()
    return next(name for name in fleet.nodes if badge.startswith(name))


def completed_responses(page: Page) -> list[dict[str, Any]]:
    """The response objects that end the page's answers, as they arrive; to be called before the page is opened."""
    responses: list[dict[str, Any]] = []

    def read(frame: str | bytes) -> None:
        event = json.loads(frame)
        if event["type"] in ("response.completed", "response.incomplete"):
            responses.append(event["response"])

    page.on("websocket", lambda socket: socket.on("framereceived", read))
    return responses


def kill_as_fleet_names_it(fleet: Fleet, name: str) -> None:
    """`kill -9` of the pid that `/fleet` shows for this node."""
    [pid] = [node["pid"] for node in fleet.router.fleet() if node["name"] == name]
    os.kill(pid, signal.SIGKILL)


def test_a_person_chats_loses_the_node_and_goes_on(make_fleet: MakeFleet, page: Page, tmp_path: Path) -> None:
    fleet = make_fleet(router=SHORT_AND_GREEDY)
    responses = completed_responses(page)
    page.goto(fleet.url)
    page.evaluate(RECORD_ANSWER)

    ask(page, "My name is Ada.")
    expect_end(page)
    assert page.evaluate("window.seen.size") > 3, "the answer came in one piece, not token by token"
    first = answering_node(page, fleet)

    kill_as_fleet_names_it(fleet, first)
    ask(page, "What is my name?")
    expect(page.locator(".exchange")).to_have_count(2)
    expect_end(page)
    assert answering_node(page, fleet) != first
    # That the model recalls the name is its own affair; that it was given the conversation is ours.
    one, two = responses
    assert two["previous_response_id"] == one["id"]
    assert two["usage"]["input_tokens"] > one["usage"]["total_tokens"]

    picture = tmp_path / "page.png"
    page.screenshot(path=picture)
    assert picture.stat().st_size > 0


def test_a_node_killed_mid_answer_hands_over_under_the_readers_eyes(make_fleet: MakeFleet, page: Page) -> None:
    fleet = make_fleet()
    page.goto(fleet.url)
    ask(page, "Tell me a long story about a river and the people who live beside it.")
    answer = page.locator(".answer")
    expect(answer).not_to_be_empty(timeout=ANSWER_MS)
    first = answering_node(page, fleet)
    kill_as_fleet_names_it(fleet, first)
    expect(page.locator(".meta .node")).to_contain_text(f"moved from {first}", timeout=ANSWER_MS)
    before = answer.text_content() or ""
    page.wait_for_function("(length) => document.querySelector('.answer').textContent.length > length", arg=len(before))

    page.press("#question", "Escape")  # 1,024 tokens would take two busy cores a while
    expect(page.locator(".exchange")).to_have_attribute("data-status", "stopped", timeout=ANSWER_MS)
    assert (answer.text_content() or "").startswith(before.rstrip())
    assert page.locator(".exchange").count() == 1
