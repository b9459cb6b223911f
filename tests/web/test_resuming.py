"""In Chromium: answers that outlive a cut, a reload, a sleep, another tab, and a router that says no."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable

import pytest
from playwright.async_api import Page, expect

from tests.web.conftest import OpenPage
from tests.web.fake_router import FakeRouter, Refusal, Script, Turn
from tests.web.steps import LOW_CONTRAST, ask, expect_phase, expect_status, wait_long

pytestmark = pytest.mark.asyncio(loop_scope="session")

WORDS = [f"word{number} " for number in range(60)]
WHOLE = "".join(WORDS).strip()
HALF = "The Rhine rises in"
REST = " the Alps."
PROGRESS_BAR = "progress:not([hidden])"


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that the fake router sees."""
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


async def hurry(page: Page) -> None:
    """From now on the page draws the shortest wait before each reconnect."""
    await page.evaluate("() => { Math.random = () => 0; }")


def half_then(more: asyncio.Event) -> Script:
    """An answer whose second half waits for `more`, whatever becomes of its readers."""

    async def script(turn: Turn) -> None:
        await turn.created()
        await turn.says(HALF)
        await more.wait()
        await turn.says(REST)
        await turn.ends()

    return script


async def half_and_silence(turn: Turn) -> None:
    await turn.created()
    await turn.says(HALF)
    await turn.stopped.wait()
    await turn.ends("incomplete", status="cancelled")


async def expect_whole(page: Page) -> None:
    await expect_status(page, "done")
    await expect(page.locator(".answer")).to_have_text(HALF + REST)
    assert await page.locator(".exchange").count() == 1


# -- cuts


@pytest.mark.parametrize("seed", range(4))
async def test_twelve_cuts_through_one_answer_change_no_word(
    open_page: OpenPage, router: FakeRouter, seed: int
) -> None:
    """Some cuts are noticed while the answer goes on, some only when there is nothing more to miss."""
    draw = random.Random(seed)
    cuts = set(draw.sample(range(len(WORDS)), 12))

    async def script(turn: Turn) -> None:
        await turn.created()
        for number, word in enumerate(WORDS):
            await turn.says(word)
            if draw.random() < 0.3:
                await asyncio.sleep(0)
            if number in cuts:
                await until(lambda: bool(turn.readers))
                await turn.drops()
                if draw.random() < 0.5:
                    await until(lambda: bool(turn.readers))
        await turn.ends()

    router.script = script
    page = await open_page()
    await hurry(page)
    await ask(page, "Count")
    await expect_status(page, "done")
    await expect(page.locator(".answer")).to_have_text(WHOLE)
    assert len(router.sent("response.create")) == 1
    assert len(router.sent("edgechat:resume")) >= 12


async def test_a_cut_before_the_first_word_and_one_before_the_end_are_picked_up_too(
    open_page: OpenPage, router: FakeRouter
) -> None:
    async def script(turn: Turn) -> None:
        await turn.created()
        await turn.drops()
        await until(lambda: bool(turn.readers))
        await turn.says(HALF + REST)
        await turn.drops()
        await turn.ends()

    router.script = script
    page = await open_page()
    await hurry(page)
    await ask(page, "Rhine?")
    await expect_whole(page)


async def test_a_router_that_restarts_goes_on_where_it_stopped(open_page: OpenPage, router: FakeRouter) -> None:
    router.script = half_and_silence
    page = await open_page()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await wait_long(page)
    await router.down()
    await expect_status(page, "away")
    await expect(page.locator(".wait")).to_have_text("The answer goes on when the connection is back")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await router.up()
    await page.click("#try-now")
    await expect_status(page, "streaming")
    [turn] = router.turns.values()
    await turn.says(REST)
    await turn.ends()
    await expect_whole(page)


async def test_a_slow_reader_that_was_closed_picks_the_answer_up(open_page: OpenPage, router: FakeRouter) -> None:
    more = asyncio.Event()
    router.script = half_then(more)
    page = await open_page()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await router.close_all(1013, b"too slow")
    await until(lambda: bool(router.sent("edgechat:resume")))
    more.set()
    await expect_whole(page)


async def test_a_network_that_was_gone_is_back_and_so_is_the_answer(open_page: OpenPage, router: FakeRouter) -> None:
    router.script = half_and_silence
    page = await open_page()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await page.context.set_offline(True)
    [turn] = router.turns.values()
    await turn.drops()
    await turn.says(REST)
    await turn.ends()
    await expect_status(page, "away")
    await expect_phase(page, "waiting")
    await page.context.set_offline(False)
    await expect_whole(page)


# -- connections that only look open


async def test_a_laptop_that_slept_asks_for_the_rest_on_a_fresh_connection(
    open_page: OpenPage, router: FakeRouter
) -> None:
    more = asyncio.Event()
    router.script = half_then(more)
    page = await open_page()
    await page.clock.install()
    await page.reload()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    router.forget_the_present_connections()
    more.set()
    await page.clock.fast_forward("08:00:00")
    await expect_phase(page, "open")
    await page.clock.fast_forward(4_000)
    await expect_whole(page)


async def test_silence_in_the_middle_of_an_answer_is_not_waited_out(open_page: OpenPage, router: FakeRouter) -> None:
    more = asyncio.Event()
    router.script = half_then(more)
    page = await open_page()
    await page.clock.install()
    await page.reload()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    router.forget_the_present_connections()
    more.set()
    await page.clock.run_for(20_000)
    await expect_whole(page)


async def test_an_idle_page_that_slept_sends_the_next_question_on_a_fresh_connection(
    open_page: OpenPage, router: FakeRouter
) -> None:
    page = await open_page()
    await page.clock.install()
    await page.reload()
    await ask(page, "One")
    await expect_status(page, "done")
    router.forget_the_present_connections()
    before = router.handshakes
    await page.clock.fast_forward("08:00:00")
    await until(lambda: router.handshakes > before)
    await ask(page, "Two")
    await expect(page.locator(".answer").last).to_have_text("You said: Two")


async def test_a_tab_that_is_seen_again_distrusts_a_silent_connection(open_page: OpenPage, router: FakeRouter) -> None:
    more = asyncio.Event()
    router.script = half_then(more)
    page = await open_page()
    await page.clock.install()
    await page.reload()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await show(page, "hidden")
    router.forget_the_present_connections()
    more.set()
    await page.clock.run_for(60_000)
    await expect(page.locator(".answer")).to_have_text(HALF)
    assert router.sent("edgechat:resume") == []
    await show(page, "visible")
    await page.clock.run_for(4_000)
    await expect_whole(page)


async def show(page: Page, state: str) -> None:
    await page.evaluate(
        """(state) => {
        Object.defineProperty(document, "visibilityState", { value: state, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
        }""",
        state,
    )


async def test_a_new_conversation_is_not_held_up_by_a_dead_connection(open_page: OpenPage, router: FakeRouter) -> None:
    router.script = half_and_silence
    page = await open_page()
    await page.clock.install()
    await page.reload()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    router.forget_the_present_connections()
    [turn] = router.turns.values()
    await page.click("#new")
    router.script = lambda turn: turn.answers("New.")
    await ask(page, "New?")
    await page.clock.run_for(20_000)
    await expect(page.locator(".answer")).to_have_text("New.")
    assert turn.stopped.is_set(), "what was left is cancelled on the next connection"
    assert router.sent("edgechat:resume") == []


# -- other lives of the page


async def test_a_reload_in_the_middle_of_an_answer_goes_on_with_it(open_page: OpenPage, router: FakeRouter) -> None:
    more = asyncio.Event()
    router.script = half_then(more)
    page = await open_page()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await page.reload()
    await expect(page.locator(".answer")).to_have_text(HALF)
    await until(lambda: bool(router.sent("edgechat:resume")))
    more.set()
    await expect_whole(page)
    assert len(router.sent("response.create")) == 1


async def test_an_answer_that_ended_during_a_reload_is_there_afterwards(
    open_page: OpenPage, router: FakeRouter
) -> None:
    more = asyncio.Event()
    router.script = half_then(more)
    page = await open_page()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await page.goto("about:blank")
    more.set()
    await until(lambda: next(iter(router.turns.values())).is_over)
    await page.go_back()
    await expect_whole(page)


async def test_a_tab_restored_from_any_moment_ends_with_the_same_words(open_page: OpenPage, router: FakeRouter) -> None:
    """What a crash leaves behind: a state that was stored a while ago."""
    go_on = asyncio.Semaphore(0)

    async def script(turn: Turn) -> None:
        await turn.created()
        for word in WORDS:
            await go_on.acquire()
            await turn.says(word)
        await turn.ends()

    router.script = script
    page = await open_page()
    await ask(page, "Count")
    await expect_status(page, "streaming")
    stored: set[str] = set()
    for last in range(9, len(WORDS), 10):
        for _ in range(10):
            go_on.release()
        await expect(page.locator(".answer")).to_contain_text(f"word{last}")
        await show(page, "hidden")  # stores at once
        stored.add(await page.evaluate("sessionStorage.getItem('edgechat.conversation')"))
    await expect_status(page, "done")
    assert len(stored) == 6
    for state in stored:
        other = await page.context.new_page()
        await other.add_init_script(f"sessionStorage.setItem('edgechat.conversation', {json.dumps(state)})")
        await other.goto(router.url)
        await expect(other.locator(".exchange")).to_have_attribute("data-status", "done")
        await expect(other.locator(".answer")).to_have_text(WHOLE)
        await other.close()


async def test_two_tabs_read_one_answer_and_keep_their_own_conversations(
    open_page: OpenPage, router: FakeRouter
) -> None:
    more = asyncio.Event()
    router.script = half_then(more)
    page = await open_page()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await show(page, "hidden")  # stores what a duplicate of the tab begins with
    async with page.context.expect_page() as opened:
        await page.evaluate("() => { window.open(location.href); }")
    other = await opened.value
    await expect(other.locator(".answer")).to_have_text(HALF)
    await until(lambda: len(next(iter(router.turns.values())).readers) == 2)
    more.set()
    for tab in (page, other):
        await expect_whole(tab)
    router.script = lambda turn: turn.answers("Another.")
    await ask(other, "And then?")
    await expect(other.locator(".answer").last).to_have_text("Another.")
    for tab, count in ((page, 1), (other, 2)):
        await tab.reload()
        await expect(tab.locator(".exchange")).to_have_count(count)


# -- refusals


async def test_a_refusal_that_passes_is_not_even_mentioned(open_page: OpenPage, router: FakeRouter) -> None:
    more = asyncio.Event()
    router.script = half_then(more)
    router.refusals = [Refusal(503, "router_unreachable", "Not now.", retry_after_ms=20)] * 2
    page = await open_page()
    await hurry(page)
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await next(iter(router.turns.values())).drops()
    await expect(page.locator(".wait")).to_have_text("Picking up the answer where it stopped")
    await expect(page.locator(".outcome")).to_be_hidden()
    await until(lambda: len(router.sent("edgechat:resume")) == 3)
    more.set()
    await expect_whole(page)
    assert router.turns["resp_fake_0"].resumed_after == [3]


async def test_a_router_that_refuses_for_good_leaves_what_was_said_and_a_way_on(
    open_page: OpenPage, router: FakeRouter
) -> None:
    router.script = half_and_silence
    router.refusals = [Refusal(503, "router_unreachable", "The router 'b' does not answer; try again.")] * 99
    page = await open_page()
    await page.clock.install()
    await page.reload()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await next(iter(router.turns.values())).drops()
    while await page.locator("[data-status=interrupted]").count() == 0:
        await page.clock.run_for(8_000)
    await expect(page.locator(".answer")).to_have_text(HALF)
    await expect(page.locator(".outcome")).to_contain_text("cannot be reached")
    assert len(router.sent("edgechat:resume")) == 25
    router.script = lambda turn: turn.answers("It rises in the Alps.")
    await page.click("[data-do=retry]")
    await expect(page.locator(".answer")).to_have_text("It rises in the Alps.")


async def test_an_answer_that_the_server_no_longer_has_is_interrupted_and_can_be_asked_again(
    open_page: OpenPage, router: FakeRouter
) -> None:
    async def script(turn: Turn) -> None:
        await turn.created()
        await turn.says(HALF)
        del router.turns[turn.response_id]
        await turn.drops()

    router.script = script
    page = await open_page()
    await ask(page, "Rhine?")
    await expect_status(page, "interrupted")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await expect(page.locator(".outcome")).to_contain_text("no longer has this answer")
    await expect(page.locator(".outcome")).not_to_contain_text("resp_fake")
    router.script = lambda turn: turn.answers("It rises in the Alps.")
    await page.click("[data-do=retry]")
    await expect_status(page, "done")
    await expect(page.locator(".answer")).to_have_text("It rises in the Alps.")


async def test_an_answer_that_breaks_off_because_its_store_failed_goes_on(
    open_page: OpenPage, router: FakeRouter
) -> None:
    async def script(turn: Turn) -> None:
        await turn.created()
        await turn.says(HALF)
        await turn.breaks_off("store_unavailable", "The store cannot write; try again.")
        await until(lambda: bool(turn.readers))
        await turn.says(REST)
        await turn.ends()

    router.script = script
    page = await open_page()
    await ask(page, "Rhine?")
    await expect_whole(page)


async def test_a_missing_event_never_shows(open_page: OpenPage, router: FakeRouter) -> None:
    async def script(turn: Turn) -> None:
        await turn.created()
        readers, turn.readers = turn.readers, set()
        await turn.says(HALF)
        turn.readers = readers
        await turn.says(REST)
        await turn.ends()

    router.script = script
    page = await open_page()
    await ask(page, "Rhine?")
    await expect_whole(page)


# -- what a person does meanwhile


async def test_stop_while_away_ends_the_answer_here_and_there(open_page: OpenPage, router: FakeRouter) -> None:
    router.script = half_and_silence
    page = await open_page()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await wait_long(page)
    await router.down()
    await expect_status(page, "away")
    await page.click("#stop")
    await expect_status(page, "stopped")
    await router.up()
    await page.click("#try-now")
    [turn] = router.turns.values()
    await until(turn.stopped.is_set)
    assert router.sent("edgechat:resume") == []
    await expect(page.locator(".answer")).to_have_text(HALF)


async def test_a_new_conversation_while_away_cancels_the_old_answer_on_return(
    open_page: OpenPage, router: FakeRouter
) -> None:
    router.script = half_and_silence
    page = await open_page()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await wait_long(page)
    await router.down()
    await expect_status(page, "away")
    await page.click("#new")
    router.script = lambda turn: turn.answers("New.")
    await ask(page, "New?")
    await router.up()
    await page.click("#try-now")
    await expect(page.locator(".answer")).to_have_text("New.")
    assert router.turns["resp_fake_0"].stopped.is_set()
    assert router.sent("edgechat:resume") == []


async def test_an_answer_that_is_away_can_be_copied_and_a_question_asked_meanwhile_follows_it(
    open_page: OpenPage, router: FakeRouter
) -> None:
    router.script = half_and_silence
    page = await open_page()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await wait_long(page)
    await router.down()
    await expect_status(page, "away")
    await expect(page.locator("[data-copy=answer]")).to_be_visible()
    router.script = lambda turn: turn.answers("Yes.")
    await ask(page, "Really?")
    await expect_status(page, "queued")
    await router.up()
    await page.click("#try-now")
    await expect_status(page, "queued")
    [turn] = router.turns.values()
    await turn.says(REST)
    await turn.ends()
    await expect(page.locator(".answer")).to_have_text([HALF + REST, "Yes."])
    assert router.requests[-1]["previous_response_id"] == turn.response_id


# -- a long prefill


async def test_a_long_reading_shows_how_far_it_is_and_for_how_long_through_a_cut(
    open_page: OpenPage, router: FakeRouter
) -> None:
    async def script(turn: Turn) -> None:
        await turn.created()
        await turn.reads(300, 1000)
        await turn.stopped.wait()

    router.script = script
    page = await open_page()
    await page.clock.install()
    await page.reload()
    await ask(page, "Long")
    wait, bar = page.locator(".wait"), page.get_by_role("progressbar", name="Conversation read")
    await expect(wait).to_contain_text("Reading the conversation, 30 %")
    await expect(bar).to_have_js_property("value", 30)
    await page.clock.run_for(7_000)
    await expect(wait).to_contain_text(re.compile(r"[789] s$"))
    [turn] = router.turns.values()
    await wait_long(page)
    await turn.drops()
    await expect_status(page, "away")
    await expect(wait).to_contain_text("The answer goes on when the connection is back")
    await expect(bar).to_have_js_property("value", 30)
    await page.click("#try-now")
    await until(lambda: bool(turn.readers))
    await turn.reads(600, 1000)
    await expect(wait).to_contain_text("Reading the conversation, 60 %")
    await expect(bar).to_have_js_property("value", 60)
    await page.reload()
    await expect(bar).to_have_js_property("value", 60)
    await until(lambda: bool(turn.readers))
    await turn.reads(1000, 1000)
    await expect(bar).to_be_hidden()
    await expect(wait).to_contain_text("Waiting for the first words")
    await turn.says("Done reading.")
    await expect(wait).to_be_hidden()
    await turn.ends()
    await expect_status(page, "done")


async def test_a_screen_reader_hears_of_the_loss_and_the_return_and_the_whole_answer_once(
    open_page: OpenPage, router: FakeRouter
) -> None:
    more = asyncio.Event()
    router.script = half_then(more)
    page = await open_page()
    await ask(page, "Rhine?")
    await expect(page.locator(".answer")).to_have_text(HALF)
    await wait_long(page)
    await page.evaluate(RECORD_SAID)
    await next(iter(router.turns.values())).drops()
    await expect(page.get_by_role("log")).to_have_text("The connection was lost. Reconnecting.")
    await page.click("#try-now")
    await expect(page.get_by_role("log")).to_have_text("Connected again.")
    more.set()
    await expect_whole(page)
    assert await page.evaluate("window.said") == [
        "The connection was lost. Reconnecting.",
        "Connected again.",
        f"Answer: {HALF}{REST}",
    ]


RECORD_SAID = """() => {
  window.said = [];
  const log = document.querySelector("#announcer");
  new MutationObserver(() => window.said.push(log.textContent)).observe(log, { childList: true });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_what_is_said_while_away_and_while_reading_has_enough_contrast(
    open_page: OpenPage, router: FakeRouter, scheme: str
) -> None:
    async def read(turn: Turn) -> None:
        await turn.created()
        await turn.reads(300, 1000)

    router.script = read
    page = await open_page(color_scheme=scheme)
    await ask(page, "Long")
    await expect(page.locator(PROGRESS_BAR)).to_be_visible()
    assert await page.evaluate(LOW_CONTRAST) == []
    await wait_long(page)
    await router.down()
    await expect_status(page, "away")
    assert await page.evaluate(LOW_CONTRAST) == []
