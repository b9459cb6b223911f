"""The state machine of one response: fencing, order, failover, cancelling, exactly one end."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.frames import Cancel, Done, Failed, Generate, Progress, Row, Sampling, Started, Timings, Usage
from core.stream import EndRecord, Event, Failure, RequestRecord, replay
from router.effects import Deliver, Effect, Finished, NeedNode, Place, Reading, Refused, SendNode, Serving, Write
from router.errors import Draining
from router.journal import Began, Dropped, Ended, Entry, Outcome, Placed, Read, Said, StoredResponse, Unfinished
from router.session import MAX_FRUITLESS_LOSSES, MAX_UNPROMISED_DISPATCHES, Instant, Session
from tests.router.fakes import RELEASE, record, words

NOW = Instant(10.0, 1010)
IDS, DELTAS = words("one", " two", " three")
STREAM = "resp_t_1"
TERMINAL = {"response.completed", "response.incomplete", "response.failed"}


class Settled:
    """A session whose writes are kept at once: for all that is not about writing."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._session, name)
        return (lambda *given, **named: self._settle(found(*given, **named))) if callable(found) else found

    def _settle(self, effects: Any) -> Any:
        if not isinstance(effects, list):
            return effects
        settled: list[Effect] = []
        for effect in effects:
            settled += self._session.on_written("kept") if isinstance(effect, Write) else [effect]
        return settled


def place(node: str, variant: str = "cpu-int8", context_tokens: int = 2048) -> Place:
    return Place(node, variant, context_tokens)


def unsettled(made: RequestRecord, **settings: Any) -> Session:
    """A session whose writes wait for the test."""
    base: dict[str, Any] = {
        "cache_salt": "salt",
        "orphan_grace_s": 30.0,
        "failover_wait_s": 15.0,
        "prefix_keys": ["key"],
    }
    return Session(made, made.request.input, **(base | settings))


def dispatched(**changes: object) -> tuple[Any, list[Effect]]:
    """A session that was sent to node `a`, which has not answered yet."""
    session = Settled(unsettled(record(**changes)))
    return session, session.start(place("a"), NOW, NOW.mono_s)


def started(**changes: object) -> tuple[Any, list[Effect]]:
    """A session that node `a` has accepted."""
    session, effects = dispatched(**changes)
    return session, [*effects, *session.on_frame("a", Progress(STREAM, 1, 0, 5), NOW)]


def later(seconds: float) -> Instant:
    return Instant(NOW.mono_s + seconds, NOW.unix_s + int(seconds))


def row(epoch: int, seq: int, count: int = 1) -> Row:
    return Row(STREAM, epoch, seq, IDS[seq : seq + count], DELTAS[seq : seq + count])


def done(epoch: int, finish: Any = "stop") -> Done:
    return Done(STREAM, epoch, finish, Usage(5, 0, 4), Timings())


def failed(epoch: int, code: str, *, retryable: bool) -> Failed:
    return Failed(STREAM, epoch, code, retryable, "It broke; try again.")


def events(effects: list[Effect]) -> list[Event]:
    return [event for effect in effects if isinstance(effect, Deliver) for event in effect.events]


def types(effects: list[Effect]) -> list[str]:
    return [event["type"] for event in events(effects)]


def sent(effects: list[Effect]) -> list[Generate | Cancel]:
    return [effect.frame for effect in effects if isinstance(effect, SendNode)]


def test_a_response_is_promised_when_its_node_has_accepted_it() -> None:
    session, effects = dispatched()
    assert types(effects) == []
    promised = session.on_frame("a", Progress(STREAM, 1, 0, 5), NOW)
    assert types(promised) == ["response.created", "response.in_progress"]
    assert promised[1:] == [Serving("a"), Reading(0, 5)]
    assert types(session.on_frame("a", Progress(STREAM, 1, 5, 5), NOW)) == []


def test_a_node_lost_before_it_accepted_is_replaced_before_anything_is_promised() -> None:
    session, _ = dispatched()
    assert session.on_node_lost("a", NOW) == [NeedNode(RELEASE, frozenset({"a"}))]
    assert types(session.assign(place("b"), NOW)) == []
    assert types(session.on_frame("b", row(2, 0), NOW))[:2] == ["response.created", "response.in_progress"]


def test_a_request_cancelled_before_it_was_accepted_leaves_no_response() -> None:
    session, _ = dispatched()
    cancel, refused = session.on_cancel(NOW)
    assert cancel == SendNode("a", Cancel(STREAM, 1))
    assert isinstance(refused, Refused)
    assert session.ended
    assert session.on_frame("a", row(1, 0), NOW) == []


def test_a_warm_up_is_answered_with_nothing_and_can_be_continued_from() -> None:
    made = record()
    session = Settled(unsettled(made))
    effects = session.warm_up(NOW)
    assert types(effects) == ["response.created", "response.in_progress", "response.completed"]
    assert isinstance(effects[-1], Finished)
    assert session.on_reader_left(NOW) == []


def test_the_first_dispatch_has_epoch_one_and_everything_that_the_node_needs() -> None:
    _, effects = dispatched()
    (frame,) = sent(effects)
    assert isinstance(frame, Generate)
    assert (frame.stream, frame.epoch, frame.release, frame.output_ids) == (STREAM, 1, RELEASE, [])
    assert (frame.seed, frame.cache_salt, frame.prefix_keys) == (7, "salt", ["key"])


EVERYTHING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": -0.3,
    "logit_bias": [(5, -100.0)],
    "logprobs": True,
    "top_logprobs": 3,
    "stop": ["END"],
    "max_output_tokens": 99,
    "tools": [{"type": "function", "name": "f"}, {"type": "function", "name": "g"}],
    "text": {"format": {"type": "json_object"}},
    "reasoning": {"effort": "high", "summary": None},
    "truncation": "auto",
    "service_tier": "flex",
    "exact": True,
    "deadline_s": 9.0,
}


def test_a_node_is_told_all_that_was_asked_for_and_so_is_the_next() -> None:
    session, effects = dispatched(**EVERYTHING)
    (first,) = sent(effects)
    session.on_node_lost("a", NOW)
    (second,) = sent(session.assign(place("b"), NOW))
    assert isinstance(first, Generate)
    assert first.sampling == Sampling(0.5, 0.9, 40, 0.05, 1.1, 0.2, -0.3, [(5, -100.0)], 3)
    assert (first.stop, first.max_output_tokens, first.tools) == (["END"], 99, EVERYTHING["tools"])
    assert (first.format, first.effort, first.truncation) == ({"type": "json_object"}, "high", "auto")
    assert (first.priority, first.exact, first.deadline_s) == (-1, True, 9.0)
    assert second == msgspec.structs.replace(first, epoch=2)


def test_what_was_not_asked_for_is_off() -> None:
    _, effects = dispatched(top_logprobs=5)
    (frame,) = sent(effects)
    assert isinstance(frame, Generate)
    assert frame.sampling == Sampling(1.0, 1.0)
    assert (frame.format, frame.effort, frame.priority, frame.exact, frame.deadline_s) == (None, "", 0, False, 0.0)


@pytest.mark.parametrize(
    ("choice", "offered"),
    [
        ("auto", ["f", "g"]),
        ("none", []),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}, ["g"]),
    ],
)
def test_the_model_is_told_of_the_tools_that_it_may_call(choice: Any, offered: list[str]) -> None:
    _, effects = dispatched(tools=EVERYTHING["tools"], tool_choice=choice)
    (frame,) = sent(effects)
    assert isinstance(frame, Generate)
    assert [tool["name"] for tool in frame.tools] == offered


def test_the_next_node_has_what_is_left_of_the_time() -> None:
    session, _ = started(deadline_s=9.0)
    session.on_node_lost("a", NOW)
    (frame,) = sent(session.assign(place("b"), Instant(NOW.mono_s + 4.0, NOW.unix_s + 4)))
    assert isinstance(frame, Generate)
    assert frame.deadline_s == 5.0


def test_the_time_that_a_request_waited_is_part_of_its_own() -> None:
    made = record(deadline_s=9.0)
    session = Settled(unsettled(made))
    (frame,) = sent(session.start(place("a"), NOW, NOW.mono_s - 4.0))
    assert isinstance(frame, Generate)
    assert frame.deadline_s == 5.0


def test_a_request_that_waited_all_its_time_is_refused_and_nobody_is_asked() -> None:
    made = record(deadline_s=9.0)
    session = Settled(unsettled(made))
    (refused,) = session.start(place("a"), NOW, NOW.mono_s - 9.0)
    assert isinstance(refused, Refused)
    assert refused.failure.code == "deadline_exceeded"


def test_nobody_is_asked_for_an_answer_that_would_come_too_late() -> None:
    session, _ = started(deadline_s=9.0)
    session.on_frame("a", row(1, 0), NOW)
    session.on_node_lost("a", NOW)
    effects = session.assign(place("b"), Instant(NOW.mono_s + 9.0, NOW.unix_s + 9))
    assert sent(effects) == []
    response = events(effects)[-1]["response"]
    assert (response["status"], response["error"]["edgechat_code"]) == ("failed", "deadline_exceeded")
    assert response["output"][0]["content"][0]["text"] == "one"


@pytest.mark.parametrize("retryable", [False, True])
def test_a_deadline_that_has_passed_on_one_node_has_passed_on_all(retryable: bool) -> None:
    session, _ = started(deadline_s=9.0)
    effects = session.on_frame("a", failed(1, "deadline_exceeded", retryable=retryable), NOW)
    finished = effects[-1]
    assert isinstance(finished, Finished)
    assert finished.response.end.error == Failure(
        "deadline_exceeded", "The answer was not complete within the 9 s that it was given; allow more time.", False
    )


def test_an_answer_in_a_format_that_ran_out_of_tokens_is_incomplete() -> None:
    session, _ = started(text={"format": {"type": "json_object"}})
    response = events(session.on_frame("a", done(1, "length"), NOW))[-1]["response"]
    assert (response["status"], response["text"]) == ("incomplete", {"format": {"type": "json_object"}})


def test_a_whole_answer_is_delivered_and_finished_once() -> None:
    session, effects = started()
    effects += session.on_frame("a", row(1, 0, 4), NOW)
    effects += session.on_frame("a", done(1), NOW)
    assert [event["sequence_number"] for event in events(effects)] == list(range(len(events(effects))))
    assert [kind for kind in types(effects) if kind in TERMINAL] == ["response.completed"]
    finished = effects[-1]
    assert isinstance(finished, Finished)
    assert events(effects) == replay(finished.response.record, finished.response.deltas, finished.response.end)


def test_a_late_frame_from_a_dead_epoch_is_dropped() -> None:
    session, _ = started()
    session.on_node_lost("a", NOW)
    session.assign(place("b"), NOW)
    assert session.on_frame("a", row(1, 0), NOW) == []
    assert session.on_frame("b", row(1, 0), NOW) == []
    assert session.dropped_frames == 2
    assert session.ids == []


def test_a_frame_of_a_node_that_was_not_asked_is_dropped() -> None:
    session, _ = started()
    assert session.on_frame("b", row(1, 0), NOW) == []
    assert session.on_frame("b", done(1), NOW) == []
    assert (session.dropped_frames, session.ids, session.ended) == (2, [], False)


def test_the_node_is_asked_for_what_the_client_asked_for() -> None:
    _, effects = started(temperature=0.3, top_p=0.9, top_k=5, stop=["END"], max_output_tokens=11, truncation="auto")
    (frame,) = sent(effects)
    assert isinstance(frame, Generate)
    assert frame.sampling == Sampling(0.3, 0.9, 5)
    assert (frame.stop, frame.max_output_tokens, frame.truncation) == (["END"], 11, "auto")


def test_a_frame_after_the_end_is_dropped() -> None:
    session, _ = started()
    session.on_frame("a", done(1), NOW)
    assert session.on_frame("a", row(1, 0), NOW) == []
    assert session.on_frame("a", done(1), NOW) == []


def test_ids_seen_before_are_not_said_again() -> None:
    session, _ = started()
    session.on_frame("a", row(1, 0, 2), NOW)
    again = session.on_frame("a", row(1, 0, 3), NOW)
    assert [event["delta"] for event in events(again)] == [" three"]
    assert session.on_frame("a", row(1, 0, 3), NOW) == []
    assert session.ids == IDS[:3]


def test_a_gap_in_the_ids_fails_the_response_and_stops_the_node() -> None:
    session, _ = started()
    effects = session.on_frame("a", row(1, 2), NOW)
    assert sent(effects) == [Cancel(STREAM, 1)]
    assert types(effects)[-1] == "response.failed"


def test_a_node_lost_before_the_first_id_is_replaced_silently() -> None:
    session, _ = started()
    assert session.on_node_lost("a", NOW) == [NeedNode(RELEASE, frozenset({"a"}))]
    effects = session.assign(place("b"), NOW)
    (frame,) = sent(effects)
    assert isinstance(frame, Generate)
    assert (frame.epoch, frame.output_ids, frame.seed) == (2, [], 7)
    assert types(effects) == []


def test_a_node_lost_mid_answer_is_continued_from_the_ids_that_were_delivered() -> None:
    session, effects = started()
    effects += session.on_frame("a", row(1, 0, 2), NOW)
    effects += session.on_node_lost("a", NOW)
    effects += session.assign(place("b"), NOW)
    frame = sent(effects)[-1]
    assert isinstance(frame, Generate)
    assert (frame.epoch, frame.output_ids) == (2, IDS[:2])
    effects += session.on_frame("b", row(2, 2, 2), NOW)
    effects += session.on_frame("b", done(2), NOW)
    assert [event["delta"] for event in events(effects) if "delta" in event] == ["one", " two", " three"]


def test_the_loss_of_another_node_changes_nothing() -> None:
    session, _ = started()
    assert session.on_node_lost("b", NOW) == []


def test_a_response_that_no_node_can_continue_waits_then_fails_retryably_naming_the_lost_one() -> None:
    session, _ = started()
    session.on_node_lost("a", NOW)
    assert session.assign(None, NOW) == []
    assert session.on_time(later(14.9)) == [NeedNode(RELEASE, frozenset({"a"}))]
    assert session.assign(None, later(14.9)) == []
    session.on_time(later(15.0))
    effects = session.assign(None, later(15.0))
    error = events(effects)[-1]["response"]["error"]
    assert (error["edgechat_code"], error["retryable"]) == ("node_lost", True)
    assert "'a'" in error["message"]


@pytest.mark.parametrize("skips_ids", [True, False])
def test_clients_are_told_the_names_of_nodes_and_not_their_addresses(skips_ids: bool) -> None:
    url = "ws://10.0.0.7:1/link"
    session = Settled(unsettled(record(), name_of={url: "eu"}.__getitem__))
    session.start(place(url), NOW, NOW.mono_s)
    effects = session.on_frame(url, Progress(STREAM, 1, 0, 5), NOW)
    if skips_ids:
        effects += session.on_frame(url, row(1, 2), NOW)
    else:
        session.on_node_lost(url, NOW)
        effects += session.assign(None, NOW) + session.assign(None, later(15.0))
    message = events(effects)[-1]["response"]["error"]["message"]
    assert "'eu'" in message
    assert "10.0.0.7" not in message


def test_a_stream_leaves_a_suspect_node_only_for_another() -> None:
    session, _ = started()
    assert session.on_suspicion(lambda needed: False, NOW) == []
    assert [event["delta"] for event in events(session.on_frame("a", row(1, 0), NOW)) if "delta" in event] == ["one"]
    elsewhere = NeedNode(RELEASE, frozenset({"a"}))
    assert session.on_suspicion(lambda needed: needed == elsewhere, NOW) == [
        SendNode("a", Cancel(STREAM, 1)),
        elsewhere,
    ]
    (frame,) = sent(session.assign(place("b"), NOW))
    assert isinstance(frame, Generate)
    assert (frame.epoch, frame.output_ids) == (2, IDS[:1])


def test_waiting_for_a_suspect_node_ends_with_the_time_of_the_request() -> None:
    session, _ = started(deadline_s=9.0)
    effects = session.on_suspicion(lambda needed: False, Instant(NOW.mono_s + 9.0, NOW.unix_s + 9))
    assert sent(effects) == [Cancel(STREAM, 1)]
    assert events(effects)[-1]["response"]["error"]["edgechat_code"] == "deadline_exceeded"


def test_a_request_that_nobody_has_accepted_is_not_offered_for_ever() -> None:
    session, _ = dispatched()
    for number in range(1, MAX_UNPROMISED_DISPATCHES):
        session.on_frame(session.node or "", failed(number, "overloaded", retryable=True), NOW)
        session.assign(place(f"n{number}"), NOW)
    effects = session.on_frame(session.node, failed(MAX_UNPROMISED_DISPATCHES, "overloaded", retryable=True), NOW)
    assert [type(effect) for effect in effects] == [Refused]


def test_a_response_whose_nodes_are_lost_one_after_another_without_a_new_id_is_given_up() -> None:
    session, _ = started()
    for number in range(1, MAX_FRUITLESS_LOSSES):
        session.on_node_lost(session.node, NOW)
        session.assign(place(f"n{number}"), NOW)
        session.on_frame(f"n{number}", Progress(STREAM, number + 1, 0, 5), NOW)
    effects = session.on_node_lost(session.node, NOW)
    assert types(effects) == ["response.failed"]


def test_any_number_of_links_may_break_at_once() -> None:
    session, _ = started()
    session.on_frame("a", row(1, 0), NOW)
    for number in range(4 * MAX_FRUITLESS_LOSSES):
        session.on_node_lost(session.node, NOW)
        session.assign(place(f"n{number}"), NOW)  # whose link is the next to break
    assert not session.ended
    session.on_node_lost(session.node, NOW)
    assert session.assign(None, later(14.9)) == []
    assert types(session.assign(None, later(15.0)))[-1] == "response.failed"


def test_as_long_as_ids_come_nodes_may_be_lost_without_end() -> None:
    session, _ = started(max_output_tokens=64)
    for number in range(4 * MAX_FRUITLESS_LOSSES):
        session.on_frame(session.node, Row(STREAM, session.epoch, number, [100], [[]]), NOW)
        session.on_node_lost(session.node, NOW)
        session.assign(place(f"n{number}"), NOW)
    assert not session.ended


def test_a_request_under_which_two_engines_died_is_not_tried_a_third_time() -> None:
    session, _ = started()
    session.on_frame("a", failed(1, "engine_lost", retryable=True), NOW)
    session.assign(place("b"), NOW)
    session.on_frame("b", row(2, 0), NOW)
    effects = session.on_frame("b", failed(2, "engine_lost", retryable=True), NOW)
    error = events(effects)[-1]["response"]["error"]
    assert (error["edgechat_code"], error["retryable"]) == ("poisoned_request", False)


@pytest.mark.parametrize("code", ["engine_stalled", "draining", "link"])
def test_links_that_break_engines_that_hang_and_nodes_that_drain_poison_nothing(code: str) -> None:
    session, _ = started()
    for epoch, node in enumerate(["b", "c", "d"], 1):
        if code == "link":
            session.on_node_lost(session.node, NOW)
        else:
            session.on_frame(session.node, failed(epoch, code, retryable=True), NOW)
        session.assign(place(node), NOW)
    assert not session.ended


@pytest.mark.parametrize("code", ["engine_lost", "engine_stalled", "overloaded", "draining", "model_not_found"])
def test_a_node_that_cannot_go_on_is_replaced(code: str) -> None:
    session, _ = started()
    assert session.on_frame("a", failed(1, code, retryable=True), NOW) == [NeedNode(RELEASE, frozenset({"a"}))]


def test_a_refusal_that_no_other_node_can_better_keeps_its_own_reason() -> None:
    session, _ = dispatched()
    session.on_frame("a", failed(1, "overloaded", retryable=True), NOW)
    (refused,) = session.assign(None, NOW)
    assert isinstance(refused, Refused)
    assert (refused.failure.code, refused.failure.message) == ("overloaded", "It broke; try again.")


def test_a_conversation_that_was_cut_is_cut_at_the_same_place_by_the_next_node() -> None:
    session, _ = started()
    session.on_frame("a", Started(STREAM, 1, 100, 0, dropped_items=4), NOW)
    session.on_node_lost("a", NOW)
    (frame,) = sent(session.assign(place("b"), NOW))
    assert isinstance(frame, Generate)
    assert frame.dropped_items == 4


def test_an_answer_that_the_first_nodes_context_ends_is_no_longer_on_a_larger_node() -> None:
    session = Settled(unsettled(record(max_output_tokens=64)))
    session.start(place("small", context_tokens=110), NOW, NOW.mono_s)
    session.on_frame("small", Started(STREAM, 1, 100, 0), NOW)
    session.on_node_lost("small", NOW)
    (frame,) = sent(session.assign(place("large"), NOW))
    assert isinstance(frame, Generate)
    assert frame.max_output_tokens == 10


def test_a_refusal_by_the_node_is_an_error_and_no_response() -> None:
    session, _ = dispatched()
    effects = session.on_frame("a", failed(1, "context_length_exceeded", retryable=False), NOW)
    assert effects == [Refused(Failure("context_length_exceeded", "It broke; try again.", False))]


def test_a_failure_after_the_promise_ends_the_response() -> None:
    session, _ = started()
    effects = session.on_frame("a", failed(1, "context_length_exceeded", retryable=False), NOW)
    error = events(effects)[-1]["response"]["error"]
    assert (error["code"], error["edgechat_code"]) == ("invalid_prompt", "context_length_exceeded")


def test_running_out_of_tokens_is_incomplete_and_says_why() -> None:
    session, _ = started()
    response = events(session.on_frame("a", done(1, "length"), NOW))[-1]["response"]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_a_cancel_stops_the_node_and_keeps_what_there_is() -> None:
    session, _ = started()
    session.on_frame("a", row(1, 0), NOW)
    effects = session.on_cancel(NOW)
    assert sent(effects) == [Cancel(STREAM, 1)]
    response = events(effects)[-1]["response"]
    assert types(effects)[-1] == "response.incomplete"
    assert (response["status"], response["output"][0]["content"][0]["text"]) == ("cancelled", "one")
    assert session.on_cancel(NOW) == []


def test_progress_is_passed_on_and_takes_no_number() -> None:
    session, _ = started()
    assert session.on_frame("a", Progress(STREAM, 1, 3, 9), NOW) == [Reading(3, 9)]


def test_an_unstored_response_is_cancelled_as_soon_as_its_reader_leaves() -> None:
    session, _ = started(store=False)
    assert sent(session.on_reader_left(NOW)) == [Cancel(STREAM, 1)]


def test_a_stored_response_goes_on_without_a_reader_for_the_grace_only() -> None:
    session, _ = started()
    assert session.on_reader_left(NOW) == []
    assert session.on_time(Instant(39.9, 1039)) == []
    assert sent(session.on_time(Instant(40.0, 1040))) == [Cancel(STREAM, 1)]


def test_a_reader_that_comes_back_ends_the_grace() -> None:
    session, _ = started()
    session.on_reader_left(NOW)
    session.on_reader_joined()
    assert session.on_time(Instant(99.0, 1099)) == []


def test_a_response_that_ended_without_a_reader_wakes_nobody() -> None:
    session, _ = started()
    session.on_reader_left(NOW)
    session.on_frame("a", done(1), NOW)
    assert session.on_time(later(99.0)) == []


def test_usage_of_a_cut_answer_counts_what_was_read_and_said() -> None:
    session, _ = started()
    session.on_frame("a", Started(STREAM, 1, 12, 8), NOW)
    session.on_frame("a", row(1, 0, 2), NOW)
    usage = events(session.on_cancel(NOW))[-1]["response"]["usage"]
    assert (usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"], usage["output_tokens"]) == (12, 8, 2)


# -- writing before telling ------------------------------------------------------------------------


def entries(effects: list[Effect]) -> list[str]:
    return [type(effect.entry).__name__ for effect in effects if isinstance(effect, Write)]


def written(count: int = 1, **changes: object) -> tuple[Session, list[Effect]]:
    """A session whose node has said that many ids; only what it began with is written."""
    session = unsettled(record(**changes))
    session.start(place("a"), NOW, NOW.mono_s)
    effects = session.on_frame("a", row(1, 0, count), NOW)
    return session, effects


def test_nothing_is_told_before_it_is_written() -> None:
    session, effects = written(2)
    assert (entries(effects), events(effects)) == (["Began", "Said"], [])
    assert types(session.on_written("kept")) == ["response.created", "response.in_progress"]
    assert [event.get("delta") for event in events(session.on_written("kept"))][-2:] == ["one", " two"]
    ending = session.on_frame("a", done(1), NOW)
    assert (entries(ending), events(ending)) == (["Ended"], [])
    last = session.on_written("kept")
    assert types(last)[-1] == "response.completed"
    assert isinstance(last[-1], Finished)


def test_what_is_not_to_be_stored_is_told_at_once_and_never_written() -> None:
    session, effects = written(4, store=False)
    effects += session.on_frame("a", done(1), NOW)
    assert entries(effects) == []
    assert types(effects)[-1] == "response.completed"


def test_another_node_continues_also_from_ids_that_are_not_written_yet() -> None:
    session, _ = written(2)
    session.on_node_lost("a", NOW)
    (frame,) = sent(session.assign(place("b"), NOW))
    assert isinstance(frame, Generate)
    assert frame.output_ids == IDS[:2]


def test_an_answer_that_cannot_be_written_stops_without_an_end() -> None:
    session, effects = written(1)
    effects += session.on_written("kept")
    effects += session.on_written("refused")
    assert sent(effects) == [Cancel(STREAM, 1)]
    assert types(effects) == ["response.created", "response.in_progress"]
    refused = effects[-1]
    assert isinstance(refused, Refused)
    assert (refused.failure.code, refused.failure.retryable) == ("store_unavailable", True)
    assert session.on_written("kept") == []
    assert session.on_frame("a", row(1, 1), NOW) == []


def test_an_answer_that_another_router_took_over_stops_here_without_an_end() -> None:
    session, _ = written(1)
    session.on_written("kept")
    effects = session.on_written("lost")
    refused = effects[-1]
    assert isinstance(refused, Refused)
    assert (refused.failure.code, refused.failure.retryable) == ("response_moved", True)
    assert events(effects) == []


@pytest.mark.parametrize("store", [True, False])
def test_a_stream_that_its_node_gives_to_another_router_stops_here_without_an_end(store: bool) -> None:
    session, _ = started(store=store)
    (refused,) = session.on_frame("a", failed(1, "response_moved", retryable=True), NOW)
    assert isinstance(refused, Refused)
    assert (refused.failure.code, refused.failure.retryable) == ("response_moved", True)
    assert session.ended


def test_an_end_that_cannot_be_written_is_not_told() -> None:
    session, _ = written(4)
    session.on_written("kept")
    session.on_written("kept")
    session.on_frame("a", done(1), NOW)
    effects = session.on_written("refused")
    assert (events(effects), [type(effect) for effect in effects]) == ([], [Refused])


def test_a_response_that_nobody_wants_kept_is_dropped_from_the_store() -> None:
    session, _ = written(1)
    effects = session.on_cancel(NOW, keep=False)
    assert entries(effects) == ["Dropped"]
    session.on_written("kept")
    session.on_written("kept")
    assert types(session.on_written("kept"))[-1] == "response.incomplete"


def test_a_router_that_stops_leaves_the_answer_as_it_is_written() -> None:
    session, _ = written(1)
    effects = session.suspend(Draining())
    assert sent(effects) == [Cancel(STREAM, 1)]
    refused = effects[-1]
    assert isinstance(refused, Refused)
    assert refused.failure.code == "draining"
    assert (session.suspend(Draining()), session.on_written("kept")) == ([], [])


def test_what_the_first_node_settled_is_written_once() -> None:
    session, effects = written(1)
    effects = session.on_frame("a", Started(STREAM, 1, 12, 8, 2), NOW)
    assert effects == [Write(Read(STREAM, Placed(12, 8, 2, "cpu-int8", 12 + 64)))]
    session.on_node_lost("a", NOW)
    session.assign(place("b", "cuda-fp4"), NOW)
    assert session.on_frame("b", Started(STREAM, 2, 12, 0, 2), NOW) == []


def test_an_answer_goes_on_where_it_has_the_room_it_was_begun_with_and_best_as_the_same_variant() -> None:
    session, _ = started(max_output_tokens=4000)
    session.on_frame("a", Started(STREAM, 1, 12, 8), NOW)
    assert session.on_node_lost("a", NOW) == [NeedNode(RELEASE, frozenset({"a"}), "cpu-int8", 2048)]


def end_of(effects: list[Effect]) -> EndRecord:
    finished = effects[-1]
    assert isinstance(finished, Finished)
    return finished.response.end


@pytest.mark.parametrize(
    ("finish", "status", "reason"),
    [("stop", "completed", None), ("length", "incomplete", "max_output_tokens"), ("cancelled", "cancelled", None)],
)
def test_an_end_has_its_time_and_what_the_node_counted(finish: Any, status: Any, reason: str | None) -> None:
    session, _ = started()
    end = end_of(session.on_frame("a", done(1, finish), NOW))
    assert end == EndRecord(status=status, completed_at=1010, reason=reason, usage=Usage(5, 0, 4))


def test_a_failure_has_its_time_and_what_was_counted_here() -> None:
    session, _ = started()
    session.on_frame("a", Started(STREAM, 1, 12, 8), NOW)
    session.on_frame("a", row(1, 0, 2), NOW)
    end = end_of(session.on_frame("a", failed(1, "server_error", retryable=False), NOW))
    failure = Failure("server_error", "It broke; try again.", False)
    assert end == EndRecord(status="failed", completed_at=1010, error=failure, usage=Usage(12, 8, 2))


def test_a_cut_answer_of_which_nothing_was_counted_has_used_nothing_but_its_ids() -> None:
    session, _ = started()
    end = end_of(session.on_cancel(NOW))
    assert end == EndRecord(status="cancelled", completed_at=1010, usage=Usage(0, 0, 0))


def test_a_warm_up_ends_at_once_and_has_used_nothing() -> None:
    session = Settled(unsettled(record()))
    end = end_of(session.warm_up(NOW))
    assert end == EndRecord(status="completed", completed_at=1010, usage=Usage(0, 0, 0))


def test_what_is_written_is_all_that_somebody_else_needs_to_go_on() -> None:
    session, effects = written(4)
    made = session.record
    effects += session.on_frame("a", done(1), NOW)
    end = EndRecord(status="completed", completed_at=1010, usage=Usage(5, 0, 4))
    assert [effect.entry for effect in effects if isinstance(effect, Write)] == [
        Began(Unfinished(made, made.request.input, 0)),
        Said(STREAM, 0, IDS, DELTAS),
        Ended(StoredResponse(made, IDS, DELTAS, end)),
    ]


def test_an_unwanted_response_is_dropped_by_its_name() -> None:
    session, _ = written(1)
    assert session.on_cancel(NOW, keep=False)[-1] == Write(Dropped(STREAM))


def test_an_answer_that_is_complete_before_its_beginning_is_written_still_names_its_node() -> None:
    session, _ = written(4)
    session.on_frame("a", done(1), NOW)
    assert Serving("a") in session.on_written("kept")


def test_an_answer_that_has_lost_its_node_before_its_beginning_is_written_names_none() -> None:
    session, _ = written(1)
    session.on_node_lost("a", NOW)
    assert [type(effect) for effect in session.on_written("kept")] == [Deliver]


def test_progress_made_before_the_beginning_is_written_is_told_after_it() -> None:
    session = unsettled(record())
    session.start(place("a"), NOW, NOW.mono_s)
    assert [type(effect) for effect in session.on_frame("a", Progress(STREAM, 1, 64, 900), NOW)] == [Write]
    assert session.on_written("kept")[1:] == [Serving("a"), Reading(64, 900)]


@pytest.mark.parametrize("store", [True, False])
def test_a_response_has_readers_until_the_last_one_leaves(store: bool) -> None:
    session, _ = started(store=store)
    session.on_reader_joined()
    session.on_reader_joined()
    assert session.on_reader_left(NOW) == []
    assert session.on_reader_left(NOW) == []
    assert (session.on_time(later(99.0)), session.ended) == ([], False)
    session.on_reader_left(NOW)
    assert (session.on_time(later(29.9)), session.ended) == ([], not store)
    session.on_time(later(30.0))
    assert session.ended


# -- going on with what was written -----------------------------------------------------------------


PLACED = Placed(12, 8, 2, "cpu-int8", 76)


def resumed(count: int = 2, **changes: object) -> tuple[Any, list[Effect]]:
    """A session that goes on with a response of which that many ids are written."""
    made = record(**changes)
    session = Settled(unsettled(made))
    begun = Unfinished(made, made.request.input, 1_000_000, PLACED, IDS[:count], DELTAS[:count])
    return session, session.resume(begun, NOW)


def test_a_response_that_was_taken_over_goes_on_at_an_epoch_that_nobody_has_used() -> None:
    session, effects = resumed()
    assert effects == [NeedNode(RELEASE, frozenset(), "cpu-int8", 76)]
    (frame,) = sent(session.assign(place("b"), NOW))
    assert isinstance(frame, Generate)
    assert (frame.epoch, frame.output_ids, frame.dropped_items, frame.seed) == (1_000_001, IDS[:2], 2, 7)


def test_what_was_told_before_the_take_over_is_told_to_nobody_but_is_there_for_who_asks() -> None:
    session, _ = resumed()
    session.assign(place("b"), NOW)
    rest = session.on_frame("b", Row(STREAM, 1_000_001, 2, IDS[2:], DELTAS[2:]), NOW)
    assert [event["delta"] for event in events(rest) if "delta" in event] == [" three"]
    told = session.told()
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert told[-len(events(rest)) :] == events(rest)


def test_a_response_that_was_taken_over_waits_for_its_reader_for_the_grace_only() -> None:
    session, _ = resumed()
    session.assign(place("b"), NOW)
    assert sent(session.on_time(later(30.0))) == [Cancel(STREAM, 1_000_001)]


def test_the_time_that_a_response_had_goes_on_while_nobody_works_on_it() -> None:
    session, _ = resumed(deadline_s=9.0)
    now = Instant(NOW.mono_s, 1000 + 4)
    made = record(deadline_s=9.0)
    session = Settled(unsettled(made))
    session.resume(Unfinished(made, made.request.input, 1, PLACED, [], []), now)
    (frame,) = sent(session.assign(place("b"), now))
    assert isinstance(frame, Generate)
    assert frame.deadline_s == 5.0


# -- leaving nodes and coming back ------------------------------------------------------------------


def test_a_lost_node_is_asked_again_only_when_it_is_another_life_of_it() -> None:
    session, _ = started()
    session.on_node_lost("a", NOW)
    session.assign(None, NOW)
    assert session.on_time(later(1.0)) == [NeedNode(RELEASE, frozenset({"a"}))]
    session.on_node_renewed("a")
    assert session.on_chance() == [NeedNode(RELEASE, frozenset())]


def test_who_waits_for_a_node_asks_those_again_that_had_no_room() -> None:
    session, _ = started()
    session.on_frame("a", failed(1, "overloaded", retryable=True), NOW)
    session.assign(None, NOW)
    assert session.on_time(later(0.25)) == [NeedNode(RELEASE, frozenset())]


def test_a_draining_node_hands_its_stream_over_when_somebody_can_take_it() -> None:
    session, _ = started()
    assert session.on_drain(lambda needed: False, NOW) == []
    elsewhere = NeedNode(RELEASE, frozenset({"a"}))
    assert session.on_drain(lambda needed: needed == elsewhere, NOW) == [SendNode("a", Cancel(STREAM, 1)), elsewhere]


def test_waiting_for_a_node_ends_with_the_time_of_the_request() -> None:
    session, _ = started(deadline_s=9.0)
    session.on_node_lost("a", NOW)
    effects = session.assign(None, later(9.0))
    assert events(effects)[-1]["response"]["error"]["edgechat_code"] == "deadline_exceeded"


def test_a_stream_that_waits_for_a_node_can_be_cancelled_and_has_nobody_to_tell() -> None:
    session, _ = started()
    session.on_node_lost("a", NOW)
    session.assign(None, NOW)
    effects = session.on_cancel(NOW)
    assert (sent(effects), types(effects)) == ([], ["response.incomplete"])


# -- whatever happens -------------------------------------------------------------------------------


_epochs = st.integers(1, 4)
_nodes = st.sampled_from(["a", "b", "c"])
_steps = st.one_of(
    st.tuples(st.just("row"), _nodes, _epochs, st.integers(0, 3), st.integers(0, 4)),
    st.tuples(st.just("done"), _nodes, _epochs),
    st.tuples(st.just("failed"), _nodes, _epochs, st.booleans()),
    st.tuples(st.just("lost"), _nodes),
    st.tuples(st.just("assign"), st.one_of(st.none(), _nodes)),
    st.tuples(st.just("cancel")),
    st.tuples(st.just("left")),
    st.tuples(st.just("time"), st.floats(0, 100)),
    st.tuples(st.just("drain"), st.booleans()),
    st.tuples(st.just("written"), st.sampled_from(["kept"] * 12 + ["lost", "refused"])),
)


def _apply(session: Session, step: tuple[Any, ...], waiting: bool) -> list[Effect]:
    match step:
        case ("row", node, epoch, seq, count):
            return session.on_frame(node, row(epoch, seq, count), NOW)
        case ("done", node, epoch):
            return session.on_frame(node, done(epoch), NOW)
        case ("failed", node, epoch, retryable):
            return session.on_frame(node, failed(epoch, "engine_lost", retryable=retryable), NOW)
        case ("lost", node):
            return session.on_node_lost(node, NOW)
        case ("assign", node):
            return session.assign(None if node is None else place(node), NOW) if waiting else []
        case ("cancel",):
            return session.on_cancel(NOW)
        case ("left",):
            return session.on_reader_left(NOW)
        case ("time", seconds):
            return session.on_time(Instant(NOW.mono_s + seconds, NOW.unix_s))
        case ("drain", able):
            return session.on_drain(lambda needed: able, NOW)
    raise AssertionError(step)


@given(st.booleans(), st.lists(_steps, max_size=40))
def test_whatever_happens_the_log_is_the_replay_of_what_is_written_with_at_most_one_end(
    store: bool, steps: list[tuple[Any, ...]]
) -> None:
    session = unsettled(record(store=store))
    effects = session.start(place("a"), NOW, NOW.mono_s)
    unwritten, kept = deque[Entry](), list[Entry]()

    def happen(more: list[Effect]) -> None:
        effects.extend(more)
        unwritten.extend(effect.entry for effect in more if isinstance(effect, Write))

    def write(outcome: Outcome) -> None:
        entry = unwritten.popleft()
        happen(session.on_written(outcome))
        if outcome == "kept":
            kept.append(entry)

    for step in steps:
        if step[0] != "written":
            happen(_apply(session, step, not session.ended and session.node is None))
        elif unwritten:
            write(step[1])
        if store:
            said = [delta for entry in kept if isinstance(entry, Said) for delta in entry.deltas]
            behind = len(events(effects)) - len(replay(session.record, said, None))
            assert behind <= 0 or any(isinstance(entry, Ended | Dropped) for entry in kept)
    happen(session.on_cancel(NOW))
    while unwritten:
        write("kept")

    log = events(effects)
    assert [isinstance(effect, Finished | Refused) for effect in effects].count(True) == 1
    assert isinstance(effects[-1], Finished | Refused)
    assert [event["sequence_number"] for event in log] == list(range(len(log)))
    terminals = [event["type"] in TERMINAL for event in log].count(True)
    match effects[-1]:
        case Refused():
            assert terminals == 0
        case Finished(response):
            assert terminals == 1
            assert response.ids == IDS[: len(response.ids)]
            assert log == replay(response.record, response.deltas, response.end)


# -- how long an answer waits -------------------------------------------------------------------------


def test_the_wait_for_a_node_is_counted_from_the_loss_and_not_from_the_last_question() -> None:
    session, _ = started()
    session.on_node_lost("a", NOW)
    for seconds in (0.0, 5.0, 10.0, 14.9):
        assert session.assign(None, later(seconds)) == []
    assert types(session.assign(None, later(15.0))) == ["response.failed"]


def test_a_node_that_took_no_notice_does_not_make_the_wait_longer() -> None:
    session, _ = started()
    session.on_node_lost("a", NOW)
    session.assign(place("b"), later(10.0))
    session.on_frame("b", failed(2, "overloaded", retryable=True), later(10.0))
    assert types(session.assign(None, later(15.0))) == ["response.failed"]


def test_a_node_that_went_on_with_the_answer_ends_the_wait() -> None:
    session, _ = started()
    session.on_node_lost("a", NOW)
    session.assign(place("b"), later(10.0))
    session.on_frame("b", Progress(STREAM, 2, 0, 5), later(10.0))
    session.on_node_lost("b", later(14.0))
    assert session.assign(None, later(28.9)) == []
    assert types(session.assign(None, later(29.0))) == ["response.failed"]


def test_a_stream_that_was_handed_over_to_nobody_names_the_node_that_it_left() -> None:
    session, _ = started()
    session.on_drain(lambda needed: True, NOW)
    effects = session.assign(None, NOW) + session.assign(None, later(15.0))
    assert "'a'" in events(effects)[-1]["response"]["error"]["message"]


def test_a_response_that_was_taken_over_and_finds_no_node_names_its_model() -> None:
    session, _ = resumed()
    assert session.assign(None, later(14.9)) == []
    error = events(session.assign(None, later(15.0)))[-1]["response"]["error"]
    assert (error["edgechat_code"], "'tiny'" in error["message"]) == ("no_node_available", True)


def test_a_response_that_was_taken_over_counts_its_readers_from_none() -> None:
    session, _ = resumed()
    session.on_reader_joined()
    session.on_reader_left(later(1.0))
    session.assign(place("b"), later(1.0))
    assert session.on_time(later(30.9)) == []
    assert sent(session.on_time(later(31.0))) == [Cancel(STREAM, 1_000_001)]


def test_a_clock_that_was_set_back_gives_no_more_time_than_there_was() -> None:
    made = record(deadline_s=9.0)
    session, now = Settled(unsettled(made)), Instant(NOW.mono_s, made.created_at - 500)
    session.resume(Unfinished(made, made.request.input, 1, PLACED, [], []), now)
    (frame,) = sent(session.assign(place("b"), now))
    assert isinstance(frame, Generate)
    assert frame.deadline_s == 9.0


def test_time_runs_out_to_the_moment() -> None:
    session, _ = started(deadline_s=9.0)
    session.on_node_lost("a", NOW)
    assert session.assign(None, later(8.5)) == []
    assert session.on_suspicion(lambda needed: False, later(8.5)) == []


def test_the_wait_for_a_node_begins_when_there_was_one_since_the_router_started() -> None:
    session, _ = resumed()
    session.on_nobody_yet(later(100.0))
    assert session.assign(None, later(114.9)) == []
    assert types(session.assign(None, later(115.0)))[-1] == "response.failed"


def test_a_node_that_was_never_missed_is_not_waited_for() -> None:
    session, _ = started()
    session.on_nobody_yet(NOW)
    assert session.on_time(later(99.0)) == []
