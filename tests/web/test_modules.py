"""The page's pure modules, run where they will run: inside Chromium."""

from __future__ import annotations

import pytest

from tests.web.modules import Module

pytestmark = pytest.mark.asyncio(loop_scope="session")


# -- backoff


async def test_the_wait_before_a_reconnect_is_drawn_from_a_doubled_and_then_capped_range(modules: Module) -> None:
    waits = await modules.run("return [0, 1, 2, 3, 20, 5000].map((attempt) => backoff.backoffMs(attempt, 0.999999));")
    assert waits == [499, 999, 1999, 3999, 29999, 29999]
    assert await modules.run("return backoff.backoffMs(9, 0);") == 0


async def test_only_a_connection_that_lived_resets_the_backoff(modules: Module) -> None:
    assert await modules.run("return [0, 4999, 5000].map((lived) => backoff.attemptAfter(7, lived));") == [7, 7, 0]


@pytest.mark.parametrize(("code", "again"), [(1000, False), (1008, False), (1001, True), (1006, True), (1012, True)])
async def test_what_was_closed_on_purpose_is_not_opened_again(modules: Module, code: int, again: bool) -> None:
    assert await modules.run("return backoff.mayReconnect(argument);", code) is again


# -- state


async def test_an_answer_grows_and_ends(modules: Module) -> None:
    end = await modules.run("return play(done).exchanges[0];")
    assert (end["question"], end["answer"], end["status"], end["responseId"]) == ("Hello", "Hi", "done", "r1")


async def test_a_question_asked_while_offline_is_sent_on_return(modules: Module) -> None:
    sent = await modules.run("""
      const offline = play([cut, { type: "asked", question: "Hello" }]);
      const online = play(connect, offline);
      return [sends(offline), sends(online)];""")
    assert sent[0] is None
    assert sent[1] == {"type": "response.create", "model": "m", "input": "Hello", "store": True}


async def test_a_question_whose_answer_never_began_is_sent_again_but_not_for_ever(modules: Module) -> None:
    statuses = await modules.run("""
      let now = play(asked);
      const seen = [];
      for (let round = 0; round < 3; round += 1) {
        now = play([{ type: "connection", connection: lost }], now);
        seen.push(now.exchanges[0].status);
        now = play([...connect, { type: "sending", id: 1, atMs: 0 }], now);
      }
      return seen;""")
    assert statuses == ["queued", "queued", "unsent"]


async def test_one_question_at_a_time_is_under_way(modules: Module) -> None:
    first, second = await modules.run("""
      const busy = play([...begun, { type: "asked", question: "And then?" }]);
      const free = play([ended("done", 2)], busy);
      return [state.nextSend(busy), state.nextSend(free).message];""")
    assert first is None
    assert (second["input"], second["previous_response_id"]) == ("And then?", "r1")


async def test_stop_cancels_once_and_waits_for_the_end(modules: Module) -> None:
    cancel, after, end = await modules.run("""
      const stopping = play([...begun, { type: "stop" }]);
      const cancelled = play([state.nextSend(stopping).event], stopping);
      const stopped = play([ended("stopped", 2)], cancelled);
      return [state.nextSend(stopping).message, state.nextSend(cancelled), stopped.exchanges[0]];""")
    assert cancel == {"type": "response.cancel", "response_id": "r1"}
    assert after is None
    assert (end["status"], end["answer"]) == ("stopped", "Hi")


async def test_a_stop_before_the_answer_began_waits_for_its_id(modules: Module) -> None:
    before, after = await modules.run("""
      const early = play([...asked, { type: "stop" }]);
      return [state.nextSend(early), state.nextSend(play([created], early))];""")
    assert before is None
    assert after["message"]["response_id"] == "r1"


async def test_what_a_left_conversation_still_says_stays_out_of_the_new_one(modules: Module) -> None:
    answers, cancel, held, sent = await modules.run("""
      const left = play([...asked, { type: "new_conversation" }, { type: "asked", question: "New" }]);
      const late = play([created, says("old", 1)], left);
      const told = play([state.nextSend(late).event], late);
      const free = play([ended("stopped", 2)], told);
      return [free.exchanges.map((exchange) => exchange.answer), state.nextSend(late).message, state.nextSend(told),
              state.nextSend(free).message];""")
    assert answers == [""]
    assert cancel == {"type": "response.cancel", "response_id": "r1"}
    assert held is None
    assert sent["input"] == "New" and "previous_response_id" not in sent


async def test_a_forgotten_previous_response_is_replaced_by_the_whole_conversation(modules: Module) -> None:
    again = await modules.run("""
      const second = play([...done, { type: "asked", question: "More" }, { type: "sending", id: 2, atMs: 0 }]);
      const error = { code: "previous_response_not_found", sentence: "", param: "previous_response_id" };
      return state.nextSend(play([server({ type: "refused", error })], second)).message;""")
    assert "previous_response_id" not in again
    assert again["input"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "More"},
    ]


async def test_an_interrupted_answer_travels_as_items_behind_the_last_stored_one(modules: Module) -> None:
    request = await modules.run("""
      const error = { code: "node_lost", sentence: "", param: null };
      const two = play([...done, { type: "asked", question: "Two" }, { type: "sending", id: 2, atMs: 0 },
        server({ type: "created", responseId: "r2" }, 0), says("half", 1),
        server({ type: "ended", responseId: "r2", status: "interrupted", error }, 2),
        { type: "asked", question: "Three" }]);
      return sends(two);""")
    assert request["previous_response_id"] == "r1"
    assert [item["content"] for item in request["input"]] == ["Two", "half", "Three"]


async def test_a_cancel_that_came_too_late_does_no_harm(modules: Module) -> None:
    status = await modules.run("""
      const error = { code: "response_not_found", sentence: "", param: "response_id" };
      return play([...begun, server({ type: "refused", error })]).exchanges[0].status;""")
    assert status == "streaming"


async def test_a_connection_closed_for_good_marks_what_was_not_sent(modules: Module) -> None:
    statuses = await modules.run("""
      const queued = play([{ type: "asked", question: "One" }, { type: "connection", connection: closed },
        { type: "asked", question: "Two" }]);
      return queued.exchanges.map((exchange) => exchange.status);""")
    assert statuses == ["unsent", "unsent"]


async def test_a_node_that_takes_over_is_named_with_the_one_before(modules: Module) -> None:
    exchange = await modules.run("""
      const on = (node) => server({ type: "node", responseId: "r1", node, region: "x" });
      return play([...begun, on("eu"), on("us")]).exchanges[0];""")
    assert (exchange["node"]["name"], exchange["movedFrom"]) == ("us", "eu")


# -- wire


async def test_our_code_is_found_in_front_of_the_sentence(modules: Module) -> None:
    ended = await modules.run(
        """return wire.readFrame(JSON.stringify({ type: "response.failed", sequence_number: 9, response: { id: "r1",
        error: { code: "server_error", message: "node_lost: The node was lost.", retryable: true } } }));"""
    )
    assert (ended["status"], ended["error"]["code"], ended["error"]["sentence"]) == (
        "interrupted",
        "node_lost",
        "The node was lost.",
    )


async def test_an_event_that_says_nothing_here_still_counts(modules: Module) -> None:
    read = 'return wire.readFrame(\'{"type": "response.in_progress", "sequence_number": 1}\');'
    assert await modules.run(read) == {"type": "other", "sequence": 1}


@pytest.mark.parametrize("frame", ["<html>", '{"type": "response.output_text.delta", "delta": "x"}'])
async def test_nonsense_and_events_without_a_number_are_reported(modules: Module, frame: str) -> None:
    assert (await modules.run("return wire.readFrame(argument);", frame))["error"]["code"] == "bad_frame"


async def test_messages_of_other_kinds_are_ignored(modules: Module) -> None:
    assert await modules.run("""return wire.readFrame('{"type": "edgechat:notification"}');""") is None


@pytest.mark.parametrize(
    ("key", "usable"), [("dev", True), ("sk-a_b.c~1", True), ("", False), ("a b", False), ("é", False)]
)
async def test_a_key_must_fit_into_a_subprotocol(modules: Module, key: str, usable: bool) -> None:
    assert await modules.run("return wire.isUsableKey(argument);", key) is usable


# -- storage


async def test_the_oldest_exchanges_give_way_when_storage_is_short(modules: Module) -> None:
    kept = await modules.run("""
      const [one] = play(done).exchanges;
      const many = Array.from({ length: 10 }, (_, id) => ({ ...one, id, answer: "x".repeat(1000) }));
      return storage.unpack(storage.pack(many, 4000)).map((exchange) => exchange.id);""")
    assert kept == [7, 8, 9]


@pytest.mark.parametrize("stored", [None, "", "{", "null", "{}", '[null, 1, {"id": "x"}]'])
async def test_damaged_storage_reads_as_an_empty_conversation(modules: Module, stored: str | None) -> None:
    assert await modules.run("return storage.unpack(argument);", stored) == []


# -- strings


async def test_both_languages_say_the_same_things(modules: Module) -> None:
    shapes = await modules.run("""
      const shape = (value) => Array.isArray(value) ? value.length : typeof value === "object"
        ? Object.fromEntries(Object.keys(value).sort().map((key) => [key, shape(value[key])])) : typeof value;
      return [shape(strings.STRINGS.en), shape(strings.STRINGS.zh)];""")
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("stored", "preferred", "language"),
    [(None, ["zh-TW", "en"], "zh"), (None, ["de-DE", "fr"], "en"), ("en", ["zh-CN"], "en"), ("xx", ["fr", "zh"], "zh")],
)
async def test_the_language_is_the_stored_one_or_the_browsers(
    modules: Module, stored: str | None, preferred: list[str], language: str
) -> None:
    assert await modules.run("return strings.chooseLanguage(...argument);", [stored, preferred]) == language


# -- markdown


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("a **b** c", [("text", "a "), ("strong", "b"), ("text", " c")]),
        ("*b* `c*d*`", [("em", "b"), ("text", " "), ("code", "c*d*")]),
        ("**half", [("text", "**half")]),
        ("`half **b**", [("text", "`half "), ("strong", "b")]),
        ("2 * 3 * 4", [("text", "2 * 3 * 4")]),
        ("**", [("text", "**")]),
        ("<b>x</b> [a](javascript:alert(1))", [("text", "<b>x</b> [a](javascript:alert(1))")]),
    ],
)
async def test_marks_within_a_line(modules: Module, text: str, spans: list[tuple[str, str]]) -> None:
    found = await modules.run("return markdown.parseInline(argument);", text)
    assert [(span["kind"], span["text"]) for span in found] == spans


async def test_blocks_of_a_whole_answer(modules: Module) -> None:
    text = "# T\npara\n\n1. a\n   - b\n2. c\n\n```py\nx = 1\n\n```\n> q\n\n| h | i |\n|---|---|\n| 1 | 2 |\n\n---\nend"
    blocks = await modules.run("return markdown.parseBlocks(argument);", text)
    assert [block["kind"] for block in blocks] == [
        *("heading", "paragraph", "list", "code", "quote", "table", "rule", "paragraph")
    ]
    assert [(item["depth"], item["number"], item["text"]) for item in blocks[2]["items"]] == [
        *((0, 1, "a"), (1, None, "b"), (0, 2, "c"))
    ]
    assert (blocks[3]["language"], blocks[3]["text"]) == ("py", "x = 1\n")
    assert (blocks[5]["head"], blocks[5]["rows"]) == (["h", "i"], [["1", "2"]])


async def test_no_character_of_a_half_finished_answer_is_lost_or_invented(modules: Module) -> None:
    text = "Say **bold** and\n```js\nlet a = `x`;\n```\n- one\n- *two*\n\n| a | b |\n|---|"
    lost = await modules.run(
        """
      const letters = (value) => [...value].filter((c) => /[a-z]/.test(c)).sort().join("");
      const shown = (block) => [block.text, block.language, ...(block.items ?? []).map((item) => item.text),
        ...(block.head ?? []), ...(block.rows ?? []).flat()].filter((part) => part !== undefined).join("");
      const wrong = [];
      for (let end = 0; end <= argument.length; end += 1) {
        const half = argument.slice(0, end);
        const all = markdown.parseBlocks(half).map(shown).join("");
        if (letters(all) !== letters(half)) wrong.push(half);
      }
      return wrong;""",
        text,
    )
    assert lost == []


@pytest.mark.parametrize("piece", ["*", "**a ", "`", "``a`", "a*b**", "> ", "- ", "|", "#", " ", "``` `", "1. x\n"])
async def test_hostile_markup_does_not_freeze_the_page(modules: Module, piece: str) -> None:
    """Quadratic time on 200,000 characters would run into the test's own limit many times over."""
    count = await modules.run(
        """
      const text = argument.repeat(Math.ceil(200000 / argument.length));
      return markdown.parseBlocks(text).flatMap((block) => markdown.parseInline(block.source)).length;""",
        piece,
    )
    assert count >= (0 if piece.isspace() else 1)
