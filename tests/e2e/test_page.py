"""A person with a browser, real nodes, a real model: types, sees tokens arrive, loses nodes, goes on."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.e2e.clients import sdk
from tests.e2e.conftest import MakeFleet, MakeRouter
from tests.e2e.disasters import WiredFleet
from tests.e2e.processes import HOST, Fleet
from tests.e2e.wire import Wire

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


@pytest.fixture
def story_teller(three_nodes: WiredFleet, make_router: MakeRouter) -> Fleet:
    """A router for the page that lets an answer be long enough to be disturbed."""
    settings = {"ROUTER__DEFAULTS__MAX_OUTPUT_TOKENS": "200", "ROUTER__DEFAULTS__TEMPERATURE": "0.8"}
    return make_router("page", settings=settings)


def expect_the_whole_answer(page: Page, fleet: Fleet) -> None:
    """The page ends with all that the router keeps, and went on with the answer that it had begun."""
    expect_end(page)
    assert page.locator(".exchange").count() == 1
    [response_id] = asked_for(page)
    kept = sdk(fleet).responses.retrieve(response_id).output_text
    shown = page.evaluate("() => [...document.querySelectorAll('.answer')].at(-1).textContent")
    # Markdown takes marks away and space; what is left are the words.
    assert re.findall(r"\w+", shown) == re.findall(r"\w+", kept)


def asked_for(page: Page) -> list[str]:
    """The ids of the answers that were begun, from what the page was sent."""
    return list(dict.fromkeys(page.evaluate("() => window.begun")))


RECORD_IDS = """() => {
  window.begun = [];
  const Original = window.WebSocket;
  window.WebSocket = class extends Original {
    constructor(...given) {
      super(...given);
      this.addEventListener("message", ({ data }) => {
        const event = JSON.parse(data);
        if (event.type === "response.created") window.begun.push(event.response.id);
      });
    }
  };
}"""


def begin_a_story(page: Page, url: str) -> None:
    """Ask, and see the first words."""
    page.add_init_script(f"({RECORD_IDS})()")
    page.goto(url)
    ask(page, "Tell me a long story about a river.")
    page.wait_for_function("() => document.querySelector('.answer')?.textContent.length > 40")


def test_the_router_dies_and_comes_back_and_the_answer_is_whole(story_teller: Fleet, page: Page) -> None:
    begin_a_story(page, story_teller.url)
    story_teller.router.kill()
    story_teller.router.restart()
    expect_the_whole_answer(page, story_teller)


@pytest.mark.parametrize("how", [Wire.cut, Wire.silence])
def test_the_network_is_gone_for_a_while_and_the_answer_is_whole(
    story_teller: Fleet, page: Page, how: Callable[[Wire], None]
) -> None:
    wire = Wire(lambda: story_teller.router.port)
    begin_a_story(page, f"http://{HOST}:{wire.port}")
    how(wire)
    # A silent network is noticed when the page asks whether anybody is there, as it does when the system says
    # that there is a network again.
    page.evaluate("() => dispatchEvent(new Event('online'))")
    expect(page.locator("#status")).not_to_have_attribute("data-phase", "open", timeout=ANSWER_MS)
    wire.heal()
    expect_the_whole_answer(page, story_teller)
    wire.close()
