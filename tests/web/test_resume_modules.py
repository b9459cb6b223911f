"""How an answer outlives its connection, as far as it is a matter of pure rules: state, storage, watch, waits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.web.modules import Module

pytestmark = pytest.mark.asyncio(loop_scope="session")


# -- picked up


async def test_an_answer_that_lost_its_connection_is_asked_for_from_where_it_stopped(modules: Module) -> None:
    away, nothing, resume, end = await modules.run("""
      const away = play([...begun, cut]);
      const asked = sent(play([back], away));
      const whole = play([says(" there", 2), ended("done", 3)], asked);
      return [away.exchanges[0], sends(away), sends(play([back], away)), whole.exchanges[0]];""")
    assert (away["status"], away["answer"]) == ("away", "Hi")
    assert nothing is None
    assert resume == {"type": "edgechat:resume", "response_id": "r1", "starting_after": 1}
    assert (end["status"], end["answer"], end["sequence"]) == ("done", "Hi there", 3)


async def test_a_resume_is_asked_for_once_on_each_connection(modules: Module) -> None:
    once, again = await modules.run("""
      const asked = sent(play([...begun, cut, back]));
      return [sends(asked), sends(play([cut, back], asked))];""")
    assert once is None
    assert again["type"] == "edgechat:resume"


async def test_what_was_heard_before_is_not_heard_twice(modules: Module) -> None:
    exchange = await modules.run("""
      const again = [created, says("Hi", 1), says("!", 2), says("!", 2)];
      return play(again, sent(play([...begun, cut, back]))).exchanges[0];""")
    assert exchange["answer"] == "Hi!"


async def test_a_missing_event_leaves_no_wrong_text_and_what_follows_is_fetched_again(modules: Module) -> None:
    gap, later, resume, whole = await modules.run("""
      const gap = play([...begun, says("world", 3)]);
      const later = play([says("!", 4), ended("done", 5)], gap);
      const asked = sent(play([cut, back], later));
      return [gap.exchanges[0], later.exchanges[0], sends(play([cut, back], later)),
              play([says(", ", 2), says("world", 3), says("!", 4), ended("done", 5)], asked).exchanges[0]];""")
    assert (gap["answer"], gap["status"], gap["pickup"]["phase"]) == ("Hi", "away", "refused")
    assert later["refusals"] == 1, "what follows a gap is no further gap"
    assert resume["starting_after"] == 1
    assert (whole["answer"], whole["status"]) == ("Hi, world!", "done")


async def test_what_a_distrusted_connection_still_tells_does_not_make_it_trusted(modules: Module) -> None:
    exchange = await modules.run("""
      const news = [server({ type: "progress", responseId: "r1", computed: 1, total: 2 }),
        server({ type: "node", responseId: "r1", node: "eu", region: "eu" })];
      return play([...begun, says("world", 3), ...news]).exchanges[0];""")
    assert (exchange["status"], exchange["pickup"]["phase"]) == ("away", "refused")


RANDOM_CUTS = """
  let seed = argument + 1;
  const random = () => {  // mulberry32
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), seed | 1);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  const below = (count) => Math.floor(random() * count);
  const words = Array.from({ length: 40 }, (_, at) => `w${at} `);
  const log = [created, ...words.flatMap((word, at) => at % 7 === 3
    ? [server({ type: "other" }), server({ type: "text", text: word })] : [server({ type: "text", text: word })]),
    ended("done")].map((event, sequence) => server(event.event, sequence));
  let now = play(asked);
  let stored = now.exchanges;
  let next = 0; // the server's place on this connection
  let steps = 0;
  const connectAgain = () => {
    now = play([cut, ...connect], now);
    const message = sends(now);
    next = message.starting_after + 1;
    now = sent(now);
  };
  while (now.exchanges[0].status !== "done" && (steps += 1) < 5000) {
    const chance = random();
    if (next === 0 || chance < 0.8) { now = play([log[next]], now); next += 1; }
    else if (chance < 0.84) { now = play([log[below(next)]], now); }           // said twice
    else if (chance < 0.88) { stored = storage.unpack(storage.pack(now.exchanges, 1e6)); }
    else if (chance < 0.92) {                                                  // reloaded, perhaps from an older state
      if (stored[0]?.status === "away") {
        now = state.initialState({ language: "en", exchanges: stored });
        connectAgain();
      }
    } else if (chance < 0.95 && next + 1 < log.length) {                       // an event goes missing
      now = play([log[next + 1]], now);
      connectAgain();
    } else connectAgain();
  }
  return [now.exchanges[0].answer, words.join(""), now.exchanges.length, steps];
"""


@pytest.mark.parametrize("seed", range(40))
async def test_cuts_repeats_gaps_and_reloads_change_no_word(modules: Module, seed: int) -> None:
    answer, whole, count, steps = await modules.run(RANDOM_CUTS, seed)
    assert steps < 5000, f"seed {seed} came to no end"
    assert (answer, count) == (whole, 1), f"seed {seed}"


async def test_progress_outlives_the_cut_and_goes_on(modules: Module) -> None:
    before, after = await modules.run("""
      const reads = (computed) => server({ type: "progress", responseId: "r1", computed, total: 100 });
      const away = play([...asked, created, reads(40), cut]);
      return [away.exchanges[0], play([reads(60)], sent(play([back], away))).exchanges[0]];""")
    assert (before["status"], before["progress"]) == ("away", 0.4)
    assert (after["status"], after["progress"]) == ("streaming", 0.6)


async def test_a_node_that_takes_over_mid_answer_is_seen_reading_until_it_speaks(modules: Module) -> None:
    reading, speaking = await modules.run("""
      const reading = play([...begun, server({ type: "progress", responseId: "r1", computed: 1, total: 4 })]);
      return [reading.exchanges[0].progress, play([says("!", 2)], reading).exchanges[0].progress];""")
    assert (reading, speaking) == (0.25, None)


async def test_a_question_asked_meanwhile_waits_for_the_answer_to_come_back(modules: Module) -> None:
    first, second = await modules.run("""
      const waiting = play([...begun, cut, { type: "asked", question: "And then?" }, back]);
      const over = play([ended("done", 2)], sent(waiting));
      return [sends(waiting), sends(over)];""")
    assert first["type"] == "edgechat:resume"
    assert (second["input"], second["previous_response_id"]) == ("And then?", "r1")


async def test_a_connection_closed_for_good_keeps_the_answer_for_when_the_person_connects_again(
    modules: Module,
) -> None:
    status, resume = await modules.run("""
      const kept = play([...begun, { type: "connection", connection: closed }]);
      return [kept.exchanges[0].status, sends(play([back], kept))];""")
    assert status == "away"
    assert resume["starting_after"] == 1


# -- refused

REFUSED = """
  const refuse = (code, more) => server({ type: "refused",
    error: { code, sentence: "", param: null, retryable: true, retryAfterMs: null, ...more } });
"""


async def test_a_refusal_that_may_pass_is_met_on_a_fresh_connection(modules: Module) -> None:
    refused, here, there = await modules.run(
        REFUSED
        + """
      const refused = play([refuse("router_unreachable", { retryAfterMs: 2000 })], sent(play([...begun, cut, back])));
      return [refused.exchanges[0], sends(refused), sends(play([cut, back], refused))];"""
    )
    assert (refused["status"], refused["answer"], refused["error"]) == ("away", "Hi", None)
    assert refused["pickup"] == {"phase": "refused", "retryAfterMs": 2000}
    assert here is None
    assert there["type"] == "edgechat:resume"


@pytest.mark.parametrize("code", ["store_unavailable", "response_moved"])
async def test_an_answer_that_breaks_off_without_an_end_is_picked_up(modules: Module, code: str) -> None:
    exchange = await modules.run(REFUSED + "return play([...begun, refuse(argument)]).exchanges[0];", code)
    assert (exchange["status"], exchange["answer"]) == ("away", "Hi")


async def test_refusals_are_bounded_and_what_was_said_is_kept(modules: Module) -> None:
    rounds, exchange, retryable = await modules.run(
        REFUSED
        + """
      let now = play([...begun, cut, back]);
      let rounds = 0;
      while (sends(now)) {
        now = play([refuse("store_unavailable"), cut, back], sent(now));
        rounds += 1;
      }
      return [rounds, now.exchanges[0], state.canRetry(now, now.exchanges[0])];"""
    )
    assert rounds == 25
    assert (exchange["status"], exchange["answer"], exchange["error"]["code"]) == (
        *("interrupted", "Hi", "store_unavailable"),
    )
    assert retryable


async def test_an_event_forgives_earlier_refusals_and_mere_news_do_not(modules: Module) -> None:
    after_news, after_event = await modules.run(
        REFUSED
        + """
      const asked = sent(play([...begun, refuse("overloaded"), cut, back]));
      const news = play([server({ type: "node", responseId: "r1", node: "eu", region: "eu" })], asked);
      return [news.exchanges[0], play([says("!", 2)], news).exchanges[0]];"""
    )
    assert (after_news["status"], after_news["refusals"]) == ("streaming", 1)
    assert after_event["refusals"] == 0


@pytest.mark.parametrize(("code", "param"), [("response_not_found", "response_id"), ("invalid_request", "type")])
async def test_an_answer_that_cannot_be_had_any_more_is_interrupted(modules: Module, code: str, param: str) -> None:
    exchange = await modules.run(
        REFUSED
        + """
      const asked = sent(play([...begun, cut, back]));
      return play([refuse(...argument)], asked).exchanges[0];""",
        [code, {"param": param, "retryable": False}],
    )
    assert (exchange["status"], exchange["answer"], exchange["error"]["code"]) == ("interrupted", "Hi", code)


@pytest.mark.parametrize(
    ("event", "retryable"),
    [
        ({"status": 503, "code": "router_unreachable"}, True),
        ({"status": 500, "code": "x", "retry_after_ms": 100}, True),
        ({"status": 500, "code": "x", "error": {"retryable": True}}, True),
        ({"status": 404, "code": "response_not_found"}, False),
        ({"status": 504, "code": "deadline_exceeded"}, False),
    ],
)
async def test_an_error_says_whether_it_may_pass(modules: Module, event: dict[str, Any], retryable: bool) -> None:
    read = "return wire.readFrame(JSON.stringify({ type: 'error', ...argument })).error.retryable;"
    assert await modules.run(read, event) is retryable


async def test_the_waits_between_refusals_grow_to_a_bound_and_heed_the_server(modules: Module) -> None:
    least, most, asked, greedy = await modules.run("""
      const waits = (random, after) => [1, 2, 5, 24].map((nth) => resume.resumeWaitMs(nth, after, random));
      return [waits(0, null), waits(0.999999, null), waits(0, 3000), waits(0, 9e9)];""")
    assert least == [250, 500, 4000, 4000]
    assert most == [499, 999, 7999, 7999]
    assert asked == [3000, 3000, 4000, 4000]
    assert greedy == [30_000] * 4


# -- not wanted any more


async def test_stop_while_away_ends_at_once_and_the_next_connection_cancels_without_a_resume(modules: Module) -> None:
    stopped, messages = await modules.run("""
      let now = play([...begun, cut, { type: "stop" }]);
      const stopped = now.exchanges[0];
      now = play([back, { type: "asked", question: "New" }], now);
      const messages = [];
      while (sends(now)) { messages.push(sends(now)); now = sent(now); }
      return [stopped, messages];""")
    assert (stopped["status"], stopped["answer"]) == ("stopped", "Hi")
    assert messages[0] == {"type": "response.cancel", "response_id": "r1"}
    assert [message["type"] for message in messages] == ["response.cancel", "response.create"]


@pytest.mark.parametrize("event", ["stop", "new_conversation"])
async def test_what_a_resume_still_says_of_an_abandoned_answer_is_not_listened_to(modules: Module, event: str) -> None:
    stale, held, answers, cancel = await modules.run(
        """
      const left = play([{ type: argument }, { type: "asked", question: "New" }], sent(play([...begun, cut, back])));
      const late = play([says(" there", 2)], left);
      return [left.isStale, sends(left), late.exchanges.map((each) => each.answer), sends(play([cut, back], late))];""",
        event,
    )
    assert stale is True
    assert held is None
    assert answers == (["Hi", ""] if event == "stop" else [""])
    assert cancel == {"type": "response.cancel", "response_id": "r1"}


@pytest.mark.parametrize("event", ["stop", "new_conversation"])
async def test_a_connection_lost_before_the_end_was_heard_of_leaves_the_cancel_to_the_next(
    modules: Module, event: str
) -> None:
    cancel = await modules.run("return sends(play([...begun, { type: argument }, cut, back]));", event)
    assert cancel == {"type": "response.cancel", "response_id": "r1"}


async def test_a_new_conversation_while_away_is_clean_and_cancels_the_old_answer(modules: Module) -> None:
    exchanges, cancel = await modules.run("""
      const left = play([...begun, cut, { type: "new_conversation" }]);
      return [left.exchanges, sends(play([back], left))];""")
    assert exchanges == []
    assert cancel == {"type": "response.cancel", "response_id": "r1"}


# -- stored


async def test_what_ran_during_a_reload_is_away_and_what_was_not_sent_says_so(modules: Module) -> None:
    running, waiting = await modules.run("""
      const { exchanges } = play([...begun, { type: "asked", question: "Waiting" }]);
      return storage.unpack(storage.pack(exchanges, 1e6));""")
    assert (running["status"], running["answer"], running["sequence"]) == ("away", "Hi", 1)
    assert waiting["status"] == "unsent"


@pytest.mark.parametrize(
    "damage",
    ['{ "sequence": null }', '{ "sequence": "1" }', '{ "sequence": 1.5 }', '{ "sequence": -1 }', '{ "responseId": 7 }'],
)
async def test_a_stored_answer_without_its_place_is_interrupted(modules: Module, damage: str) -> None:
    status = await modules.run(
        """
      const [one] = JSON.parse(storage.pack(play(begun).exchanges, 1e6));
      return storage.unpack(JSON.stringify([{ ...one, ...JSON.parse(argument) }]))[0].status;""",
        damage,
    )
    assert status == "interrupted"


async def test_of_several_stored_answers_only_the_newest_can_have_been_running(modules: Module) -> None:
    statuses = await modules.run("""
      const [one] = play(begun).exchanges;
      return storage.unpack(storage.pack([one, { ...one, id: 2 }], 1e6)).map((each) => each.status);""")
    assert statuses == ["interrupted", "away"]


# -- watch

WATCH = """
  const awaiting = argument.awaits;
  let now = watch.initialWatch(0);
  const reconnects = [];
  const on = (type, nowMs) => {
    now = watch.step(now, { type, nowMs, awaits: awaiting });
    if (now.reconnect) reconnects.push(nowMs / 1000);
  };
  on("opened", 0);
  const ticks = (fromS, toS) => { for (let at = fromS; at <= toS; at += 1) on("tick", at * 1000); };
"""


async def reconnects(modules: Module, awaits: str | None, body: str) -> Any:
    """When the watch gave the connection up, in seconds."""
    return await modules.run(WATCH + body + "return reconnects;", {"awaits": awaits})


async def test_silence_while_an_answer_runs_is_distrusted_ever_more_patiently(modules: Module) -> None:
    assert await reconnects(modules, "answer", "ticks(1, 600);") == [15, 45, 105, 225, 345, 465, 585]


async def test_anything_heard_is_proof_of_life(modules: Module) -> None:
    assert (
        await reconnects(
            modules,
            "answer",
            "for (let at = 1; at < 300; at += 10) { ticks(at, at + 9); on('heard', (at + 9) * 1000); }",
        )
        == []
    )


async def test_after_something_was_heard_patience_is_short_again(modules: Module) -> None:
    assert await reconnects(modules, "answer", "ticks(1, 50); on('heard', 50_000); ticks(51, 70);") == [15, 45, 65]


@pytest.mark.parametrize("awaits", ["begin", "nothing", None])
async def test_silence_means_nothing_where_nothing_is_due(modules: Module, awaits: str | None) -> None:
    assert await reconnects(modules, awaits, "ticks(1, 600);") == []


@pytest.mark.parametrize("awaits", ["answer", "begin"])
async def test_a_sleep_is_noticed_and_what_is_under_way_gets_a_moment(modules: Module, awaits: str) -> None:
    assert await reconnects(modules, awaits, "ticks(1, 5); ticks(3600, 3610);") == [3603]


@pytest.mark.parametrize("awaits", ["answer", "begin"])
async def test_after_a_sleep_an_event_ends_the_doubt(modules: Module, awaits: str) -> None:
    assert (
        await reconnects(modules, awaits, "ticks(1, 5); ticks(3600, 3601); on('heard', 3_601_500); ticks(3602, 3610);")
        == []
    )


async def test_after_a_sleep_an_idle_connection_is_replaced_at_once(modules: Module) -> None:
    assert await reconnects(modules, "nothing", "ticks(1, 5); ticks(3600, 3610);") == [3600]


async def test_a_clock_set_back_is_a_jump_too(modules: Module) -> None:
    set_back = "on('heard', 1_000_000); on('tick', 1_000_000); ticks(1000, 1005); ticks(5, 12);"
    assert (await reconnects(modules, "answer", set_back))[-1] == 8


async def test_the_network_coming_back_raises_doubt(modules: Module) -> None:
    assert await reconnects(modules, "answer", "ticks(1, 5); on('online', 5_500); ticks(6, 12);") == [9]
    assert await reconnects(modules, "nothing", "ticks(1, 5); on('online', 5_500); ticks(6, 12);") == [5.5]


async def test_in_a_hidden_page_nothing_is_told_from_its_slow_timers(modules: Module) -> None:
    hidden = "ticks(1, 5); on('hidden', 5_500); for (let at = 60; at < 600; at += 60) on('tick', at * 1000);"
    assert await reconnects(modules, "answer", hidden) == []
    assert await reconnects(modules, "answer", hidden + "on('shown', 600_000); ticks(601, 606);") == [603]


async def test_a_short_look_elsewhere_moves_neither_an_idle_connection_nor_a_waiting_question(modules: Module) -> None:
    glance = "ticks(1, 5); on('hidden', 5_500); on('shown', 9_000); ticks(10, 40);"
    assert await reconnects(modules, "nothing", glance) == []
    assert await reconnects(modules, "begin", glance) == []


async def test_a_page_seen_again_after_long_has_a_fresh_connection(modules: Module) -> None:
    assert await reconnects(modules, "nothing", "on('hidden', 5_000); on('shown', 95_000); ticks(96, 99);") == [95]
