"""The page in Chromium against a router that does what a test says: no node, no model, every fault on demand."""

from __future__ import annotations

import asyncio

import pytest
from playwright.async_api import expect

from tests.web.conftest import OpenPage
from tests.web.fake_router import FakeRouter, Turn
from tests.web.steps import LOW_CONTRAST, PHONE, ask, expect_phase, expect_status, wait_long

pytestmark = pytest.mark.asyncio(loop_scope="session")


# -- a conversation


async def test_an_answer_streams_and_names_its_node(open_page: OpenPage, router: FakeRouter) -> None:
    more = asyncio.Event()

    async def script(turn: Turn) -> None:
        await turn.created("edge-1", "eu")
        await turn.says("The ", "**Rhine**")
        await more.wait()
        await turn.says(" and the Danube.")
        await turn.ends()

    router.script = script
    page = await open_page()
    await ask(page, "Rivers?")
    answer = page.locator(".answer")
    await expect(answer).to_have_text("The Rhine")
    await expect(answer.locator("strong")).to_have_text("Rhine")
    await expect_status(page, "streaming")
    more.set()
    await expect(answer).to_have_text("The Rhine and the Danube.")
    await expect_status(page, "done")
    await expect(page.locator(".meta .node")).to_have_text("edge-1 · eu")
    await expect(page.locator("header .node")).to_have_text("edge-1 · eu")
    await expect(page.locator("#question")).to_be_focused()


async def test_a_second_question_names_the_first_response(open_page: OpenPage, router: FakeRouter) -> None:
    page = await open_page()
    await ask(page, "One")
    await expect_status(page, "done")
    await ask(page, "Two")
    await expect(page.locator(".answer").last).to_have_text("You said: Two")
    assert [request.get("previous_response_id") for request in router.requests] == [None, "resp_fake_0"]


async def test_markup_from_the_model_is_shown_and_never_run(open_page: OpenPage, router: FakeRouter) -> None:
    evil = '<img src="x" onerror="window.hit=1"><script>window.hit=1</script>'
    router.script = lambda turn: turn.answers(evil, f"\n\n```html\n{evil}\n```\n- {evil}")
    page = await open_page()
    await ask(page, evil)
    await expect_status(page, "done")
    assert await page.locator("main img, main script").count() == 0
    assert await page.evaluate("window.hit") is None
    await expect(page.locator(".question")).to_have_text(evil)
    await expect(page.locator("pre code")).to_have_text(evil)


async def test_a_reload_keeps_the_conversation_and_its_thread(open_page: OpenPage, router: FakeRouter) -> None:
    page = await open_page()
    await ask(page, "Remember 17")
    await expect_status(page, "done")
    await page.reload()
    await expect(page.locator(".answer")).to_have_text("You said: Remember 17")
    await ask(page, "Which?")
    await expect(page.locator(".answer").last).to_have_text("You said: Which?")
    assert router.requests[-1]["previous_response_id"] == "resp_fake_0"


async def test_a_new_conversation_forgets_the_old_one(open_page: OpenPage, router: FakeRouter) -> None:
    page = await open_page()
    await ask(page, "One")
    await expect_status(page, "done")
    await page.click("#new")
    await expect(page.locator("#welcome")).to_be_visible()
    await page.locator("#examples button").first.click()
    await expect_status(page, "done")
    assert "previous_response_id" not in router.requests[-1]


async def test_stop_ends_the_answer_and_keeps_what_came(open_page: OpenPage, router: FakeRouter) -> None:
    async def script(turn: Turn) -> None:
        await turn.created()
        await turn.says("Once upon")
        await turn.stopped.wait()
        await turn.ends("incomplete", status="cancelled")

    router.script = script
    page = await open_page()
    await ask(page, "A story")
    await expect(page.locator(".answer")).to_have_text("Once upon")
    await page.press("#question", "Escape")
    await expect_status(page, "stopped")
    await expect(page.locator(".answer")).to_have_text("Once upon")
    await expect(page.locator("#stop")).to_be_hidden()


async def test_the_model_can_be_chosen(open_page: OpenPage, router: FakeRouter) -> None:
    router.models = ["small", "large"]
    page = await open_page()
    await page.select_option("#model", "large")
    await ask(page, "Hello")
    await expect_status(page, "done")
    assert router.requests[-1]["model"] == "large"


async def test_an_answer_and_its_code_can_be_copied(open_page: OpenPage, router: FakeRouter) -> None:
    router.script = lambda turn: turn.answers("Look:\n\n```py\nx = 1\n```")
    page = await open_page(permissions=["clipboard-read", "clipboard-write"])
    await ask(page, "Code")
    await expect_status(page, "done")
    await page.click("[data-copy=code]")
    await expect(page.locator("[data-copy=code]")).to_have_text("Copied")
    assert await page.evaluate("navigator.clipboard.readText()") == "x = 1"
    await page.click("[data-copy=answer]")
    await expect(page.locator("[data-copy=answer]")).to_have_text("Copied")
    assert await page.evaluate("navigator.clipboard.readText()") == "Look:\n\n```py\nx = 1\n```"


# -- when things break


async def test_a_lost_node_is_explained_and_the_answer_can_be_asked_again(
    open_page: OpenPage, router: FakeRouter
) -> None:
    async def lose(turn: Turn) -> None:
        await turn.created()
        await turn.says("Half")
        await turn.fails("node_lost", "The node 'edge-1' was lost; try again.", retryable=True)

    router.script = lose
    page = await open_page()
    await ask(page, "Hello")
    await expect_status(page, "interrupted")
    await expect(page.locator(".outcome")).to_contain_text("another node will take over")
    await expect(page.locator(".outcome")).to_contain_text("The node 'edge-1' was lost")
    await expect(page.locator("[data-do=retry]")).to_be_visible()


async def test_an_answer_that_moves_names_both_nodes(open_page: OpenPage, router: FakeRouter) -> None:
    async def move(turn: Turn) -> None:
        await turn.created("eu", "eu")
        await turn.says("One ")
        await turn.moved("us", "us")
        await turn.says("two.")
        await turn.ends()

    router.script = move
    page = await open_page()
    await ask(page, "Count")
    await expect_status(page, "done")
    await expect(page.locator(".meta .node")).to_have_text("us, moved from eu")


async def test_a_question_typed_while_offline_is_sent_on_return(open_page: OpenPage, router: FakeRouter) -> None:
    page = await open_page()
    await expect_phase(page, "open")
    await wait_long(page)
    await router.down()
    await expect_phase(page, "waiting")
    await expect(page.locator("#notice-text")).to_contain_text("Next attempt in")
    await ask(page, "Are you there?")
    await expect(page.locator(".delivery")).to_have_text("Will be sent when the connection is back")
    await router.up()
    await page.click("#try-now")
    await expect(page.locator(".answer")).to_have_text("You said: Are you there?")
    await expect(page.locator("#notice")).to_be_hidden()


async def test_it_comes_back_by_itself_and_at_once_when_the_network_does(
    open_page: OpenPage, router: FakeRouter
) -> None:
    page = await open_page()
    await expect_phase(page, "open")
    await router.down()
    await expect_phase(page, "waiting")
    await router.up()
    await expect_phase(page, "open")
    await wait_long(page)
    await router.down()
    await expect_phase(page, "waiting")
    await router.up()
    await page.evaluate("dispatchEvent(new Event('online'))")
    await expect_phase(page, "open")


async def test_a_close_on_purpose_is_respected_until_the_person_asks(open_page: OpenPage, router: FakeRouter) -> None:
    page = await open_page()
    await expect_phase(page, "open")
    await router.close_all(1008, b"too many requests")
    await expect_phase(page, "closed")
    await expect(page.locator("#notice-text")).to_contain_text("too many requests")
    await ask(page, "Hello?")
    await expect_status(page, "unsent")
    assert router.handshakes == 1
    await page.click("[data-do=retry]")
    await expect_status(page, "done")
    assert router.handshakes == 2


async def test_a_wrong_key_asks_for_another_and_a_right_one_is_kept(open_page: OpenPage, router: FakeRouter) -> None:
    router.key = "right"
    page = await open_page()
    await expect(page.locator("#key")).to_be_focused()
    await expect(page.locator("#key-problem")).to_have_text("")
    await page.fill("#key", "schlüssel")
    await page.press("#key", "Enter")
    await expect(page.locator("#key-problem")).to_contain_text("Latin letters")
    await page.fill("#key", "wrong")
    await page.press("#key", "Enter")
    await expect(page.locator("#key-problem")).to_contain_text("did not accept")
    await page.fill("#key", "right")
    await page.press("#key", "Enter")
    await expect_phase(page, "open")
    await page.reload()
    await expect_phase(page, "open")
    await expect(page.locator("#key-form")).to_be_hidden()


async def test_a_context_that_is_too_long_shows_both_numbers_and_a_way_out(
    open_page: OpenPage, router: FakeRouter
) -> None:
    sentence = "The conversation has 9120 tokens, the model's context holds 2048; shorten it."
    router.script = lambda turn: turn.refuses("context_length_exceeded", sentence, "input")
    page = await open_page()
    await ask(page, "Long")
    await expect_status(page, "failed")
    await expect(page.locator(".outcome")).to_contain_text("9120")
    await expect(page.locator(".outcome")).to_contain_text("2048")
    await page.click(".outcome [data-do=new]")
    await expect(page.locator("#welcome")).to_be_visible()


async def test_a_forgotten_response_is_replaced_by_the_whole_conversation(
    open_page: OpenPage, router: FakeRouter
) -> None:
    async def forget(turn: Turn) -> None:
        if "previous_response_id" in turn.request:
            await turn.refuses("previous_response_not_found", "Not found.", "previous_response_id")
        else:
            await turn.answers("Yes.")

    router.script = forget
    page = await open_page()
    await ask(page, "One")
    await expect_status(page, "done")
    await ask(page, "Two")
    await expect(page.locator(".answer")).to_have_text(["Yes.", "Yes."])
    assert [item["content"] for item in router.requests[-1]["input"]] == ["One", "Yes.", "Two"]


async def test_no_model_yet_is_waited_for(open_page: OpenPage, router: FakeRouter) -> None:
    router.models = []
    page = await open_page()
    await ask(page, "Hello")
    await expect(page.locator(".delivery")).to_have_text("Waiting for a node that serves a model")
    router.models = ["late"]
    await expect_status(page, "done")
    assert router.requests[-1]["model"] == "late"


async def test_a_browser_without_storage_still_chats(open_page: OpenPage, router: FakeRouter) -> None:
    page = await open_page()
    full = "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    await page.evaluate(full)
    await ask(page, "Hello")
    await expect_status(page, "done")
    await page.click("#language")
    await page.click("#theme")
    await ask(page, "Again")
    await expect(page.locator(".answer").last).to_have_text("You said: Again")


# -- keys, texts, eyes and ears


async def test_shift_enter_breaks_the_line_and_enter_in_an_input_method_does_not_send(
    open_page: OpenPage, router: FakeRouter
) -> None:
    page = await open_page(locale="zh-CN")
    await expect_phase(page, "open")
    await page.type("#question", "ni")
    await page.press("#question", "Shift+Enter")
    enter = "document.querySelector('#question').dispatchEvent(new KeyboardEvent('keydown', {0}))"
    for init in ("isComposing: true", "keyCode: 229"):
        await page.evaluate(enter.replace("{0}", "{ key: 'Enter', bubbles: true, cancelable: true, " + init + " }"))
    assert await page.input_value("#question") == "ni\n"
    assert router.requests == []
    await page.press("#question", "Enter")
    await expect(page.locator(".answer")).to_have_text("You said: ni")


async def test_ten_thousand_characters_are_counted_sent_and_folded(open_page: OpenPage, router: FakeRouter) -> None:
    page = await open_page()
    text = "词 word " * 1250 + "end"
    await page.fill("#question", text)
    await expect(page.locator("#count")).to_have_text(
        "10,003 of 100,000 characters".replace("10,003", f"{len(text):,}")
    )
    box = await page.locator("#composer").bounding_box()
    assert box is not None and box["height"] < 400
    await page.press("#question", "Enter")
    await expect_status(page, "done")
    assert router.requests[-1]["input"] == text
    await expect(page.locator(".question")).to_have_class("question clamped")
    await page.click("[data-do=more]")
    await expect(page.locator(".question")).to_have_class("question")


async def test_too_long_a_message_is_refused_before_it_is_sent(open_page: OpenPage, router: FakeRouter) -> None:
    page = await open_page()
    await page.fill("#question", "x" * 100_001)
    await expect(page.locator("#count")).to_contain_text("shorten the message")
    await expect(page.locator("#send")).to_be_disabled()
    await page.press("#question", "Enter")
    assert await page.input_value("#question") != ""
    assert router.requests == []


async def test_a_long_answer_follows_only_a_reader_at_the_bottom(open_page: OpenPage, router: FakeRouter) -> None:
    more = asyncio.Event()

    async def script(turn: Turn) -> None:
        await turn.created()
        await turn.says(*[f"Line {number}\n\n" for number in range(60)])
        await more.wait()
        await turn.says(*[f"Late {number}\n\n" for number in range(60)])
        await turn.ends()

    router.script = script
    page = await open_page()
    await ask(page, "Long")
    await expect(page.get_by_text("Line 59", exact=True)).to_be_in_viewport()
    await expect(page.locator("#jump")).to_be_hidden()
    await page.evaluate("document.querySelector('#scroller').scrollTop = 40")
    await expect(page.locator("#jump")).to_be_visible()
    more.set()
    await expect_status(page, "done")
    assert await page.evaluate("document.querySelector('#scroller').scrollTop") == 40
    await page.click("#jump")
    await expect(page.get_by_text("Late 59", exact=True)).to_be_in_viewport()
    await expect(page.locator("#jump")).to_be_hidden()


async def test_a_screen_reader_hears_finished_answers_and_not_each_token(
    open_page: OpenPage, router: FakeRouter
) -> None:
    more = asyncio.Event()

    async def script(turn: Turn) -> None:
        await turn.created()
        await turn.says("Half ")
        await more.wait()
        await turn.says("and whole.")
        await turn.ends()

    router.script = script
    page = await open_page()
    await ask(page, "Say it")
    await expect(page.locator(".answer")).to_have_text("Half")
    log = page.get_by_role("log")
    await expect(log).to_have_text("")
    more.set()
    await expect(log).to_have_text("Answer: Half and whole.")


async def test_every_control_has_a_name_and_the_page_has_landmarks(open_page: OpenPage, router: FakeRouter) -> None:
    router.models = ["a", "b"]
    page = await open_page()
    await ask(page, "Hello")
    await expect_status(page, "done")
    tree = await page.locator("body").aria_snapshot()
    for landmark in ("banner", "main", "contentinfo", "log", 'region "Conversation"', 'form "Message"'):
        assert landmark in tree, tree
    for button in await page.get_by_role("button").all():
        name = await button.evaluate("(node) => node.getAttribute('aria-label') || node.textContent.trim()")
        assert name, await button.evaluate("(node) => node.outerHTML")


async def test_language_and_theme_switch_and_stay(open_page: OpenPage, router: FakeRouter) -> None:
    page = await open_page(locale="zh-CN", color_scheme="dark")
    root = page.locator("html")
    await expect(root).to_have_attribute("lang", "zh-CN")
    await expect(root).to_have_attribute("data-theme", "dark")
    await expect(page.locator("#question")).to_have_attribute("placeholder", "输入消息")
    await page.click("#language")
    await page.click("#theme")
    await page.reload()
    await expect(root).to_have_attribute("lang", "en")
    await expect(root).to_have_attribute("data-theme", "light")


async def test_a_narrow_phone_needs_no_sideways_scroll(open_page: OpenPage, router: FakeRouter) -> None:
    router.script = lambda turn: turn.answers(
        "w" * 300, "\n\n```\n" + "c" * 300 + "\n```\n\n|a|b|\n|-|-|\n|" + "t " * 90
    )
    page = await open_page(**PHONE)
    await ask(page, "https://example.org/" + "u" * 200)
    await expect_status(page, "done")
    widths = await page.evaluate(
        "[document.documentElement.scrollWidth, document.querySelector('#scroller').scrollWidth, innerWidth]"
    )
    assert max(widths) == 320


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_all_text_has_enough_contrast(open_page: OpenPage, router: FakeRouter, scheme: str) -> None:
    router.script = lambda turn: turn.answers("# T\n\nText `code`\n\n> quote\n\n```py\nx\n```\n\n|a|b|\n|-|-|\n|1|2|")
    page = await open_page(color_scheme=scheme)
    await ask(page, "Look")
    await expect_status(page, "done")
    router.script = lambda turn: turn.refuses("overloaded", "All nodes are busy.")
    await ask(page, "More")
    await expect_status(page, "failed")
    await wait_long(page)
    await router.down()
    await expect(page.locator("#notice")).to_be_visible()
    await page.fill("#question", "x" * 100_001)
    assert await page.evaluate(LOW_CONTRAST) == []
    router.key = "other"
    await router.up()
    await page.click("#try-now")
    await expect(page.locator("#key")).to_be_visible()
    assert await page.evaluate(LOW_CONTRAST) == []
