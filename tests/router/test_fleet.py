from __future__ import annotations

import msgspec
import pytest

from core.frames import PROTOCOL, SPEECH_VERSION, Hello, Rates, Status
from router.fleet import FORGET_DOWN_AFTER_S, SUSPECT_AFTER_S, Fleet, State
from router.policy import Choice, choose

HELLO = Hello(PROTOCOL, "eu", "i", "europe", ["tiny@0123456789ab"], ["cpu-int8"], 2048, 2, SPEECH_VERSION, 42)
STATUS = Status(0.5, 1, 0, Rates(100.0, 50.0), [], True, False, "ready", 77)


def fleet_of(
    hello: Hello = HELLO, status: Status | None = STATUS, url: str = "ws://eu", rtt_s: float | None = 0.01
) -> Fleet:
    return add(Fleet(), hello, status, url, rtt_s)


def add(fleet: Fleet, hello: Hello, status: Status | None, url: str, rtt_s: float | None) -> Fleet:
    fleet.on_up(url, hello, 0.0)
    if rtt_s is not None:
        fleet.on_rtt(url, rtt_s)
    if status is not None:
        fleet.on_status(url, status, 0.0)
    return fleet


def status(**changes: object) -> Status:
    return msgspec.structs.replace(STATUS, **changes)


@pytest.mark.parametrize(
    ("hello", "said", "at_s", "state"),
    [
        (HELLO, STATUS, 0.0, "ready"),
        (HELLO, None, 0.0, "loading"),
        (HELLO, STATUS, SUSPECT_AFTER_S, "ready"),
        (HELLO, STATUS, SUSPECT_AFTER_S + 0.01, "suspect"),
        (HELLO, status(vouched=False), 0.0, "suspect"),
        (HELLO, status(draining=True), 0.0, "draining"),
        (HELLO, status(state="loading"), 0.0, "loading"),
        (HELLO, status(state="failed", draining=True), 0.0, "failed"),
        (msgspec.structs.replace(HELLO, speech_version=SPEECH_VERSION + 1), STATUS, 0.0, "incompatible"),
    ],
)
def test_the_state_of_a_node_follows_from_what_it_said(
    hello: Hello, said: Status | None, at_s: float, state: State
) -> None:
    fleet = fleet_of(hello, said)
    assert fleet.nodes["ws://eu"].state(at_s) == state
    assert bool(fleet.ready(at_s)) == (state == "ready")
    assert fleet.untrusted(at_s) == (set() if state in {"ready", "draining"} else {"ws://eu"})


def test_a_node_whose_link_is_down_keeps_its_model_known_for_a_while() -> None:
    fleet = fleet_of()
    fleet.on_down("ws://eu", 5.0)
    assert fleet.nodes["ws://eu"].state(5.0) == "down"
    assert fleet.knows("tiny")
    assert fleet.served(5.0) == []
    fleet.forget_long_gone(5.0 + FORGET_DOWN_AFTER_S + 1)
    assert fleet.models() == []


def test_a_drain_frame_counts_before_the_status_says_so() -> None:
    fleet = fleet_of()
    fleet.on_drain("ws://eu")
    assert fleet.nodes["ws://eu"].state(0.0) == "draining"


def test_a_node_that_comes_back_starts_afresh() -> None:
    fleet = fleet_of()
    fleet.on_drain("ws://eu")
    fleet.on_down("ws://eu", 1.0)
    fleet.on_up("ws://eu", HELLO, 2.0)
    assert fleet.nodes["ws://eu"].state(2.0) == "loading"


def test_events_of_a_node_never_met_change_nothing() -> None:
    fleet = Fleet()
    fleet.on_status("ws://x", STATUS, 0.0)
    fleet.on_rtt("ws://x", 0.1)
    fleet.on_drain("ws://x")
    fleet.on_dispatch("ws://x")
    fleet.on_down("ws://x", 0.0)
    assert fleet.nodes == {}


def test_a_row_shows_what_an_operator_asks_for() -> None:
    (row,) = fleet_of().rows(0.0)
    assert (row.name, row.region, row.release, row.variant) == ("eu", "europe", "tiny@0123456789ab", "cpu-int8")
    assert (row.pid, row.engine_pid, row.state, row.running, row.waiting, row.slots) == (42, 77, "ready", 1, 0, 2)
    assert row.rtt_ms == 10.0


def two(near: Status, far: Status) -> Fleet:
    fleet = add(Fleet(), HELLO, near, "ws://near", 0.010)
    return add(fleet, HELLO, far, "ws://far", 0.050)


def chosen(fleet: Fleet, model: str = "tiny", exclude: frozenset[str] = frozenset()) -> str | None:
    choice = choose(fleet.ready(0.0), model, exclude)
    return choice.node.url if choice else None


IDLE, FULL = status(running=0), status(running=2)


def test_the_nearest_node_with_a_free_slot_is_chosen() -> None:
    assert chosen(two(IDLE, IDLE)) == "ws://near"
    assert chosen(two(status(running=1), IDLE)) == "ws://near"
    assert chosen(two(FULL, IDLE)) == "ws://far"


def test_a_model_is_named_by_alias_or_by_release() -> None:
    assert chosen(two(IDLE, IDLE), "tiny@0123456789ab") == "ws://near"
    assert chosen(two(IDLE, IDLE), "tiny@ffffffffffff") is None
    assert choose(two(IDLE, IDLE).ready(0.0), "tiny") == Choice(two(IDLE, IDLE).nodes["ws://near"], "tiny@0123456789ab")


def test_an_excluded_node_is_not_chosen() -> None:
    assert chosen(two(IDLE, IDLE), exclude=frozenset({"ws://near"})) == "ws://far"
    assert chosen(two(IDLE, IDLE), exclude=frozenset({"ws://near", "ws://far"})) is None


def test_streams_sent_since_the_last_status_fill_a_node() -> None:
    fleet = two(IDLE, IDLE)
    fleet.on_dispatch("ws://near")
    fleet.on_dispatch("ws://near")
    assert chosen(fleet) == "ws://far"
    fleet.on_status("ws://near", IDLE, 0.0)
    assert chosen(fleet) == "ws://near"


def test_a_full_fleet_queues_on_the_least_loaded_while_the_line_is_short() -> None:
    assert chosen(two(status(running=2, waiting=1), FULL)) == "ws://far"
    assert chosen(two(FULL, status(running=2, waiting=1))) == "ws://near"
    assert chosen(two(status(running=2, waiting=2), status(running=2, waiting=3))) is None


def test_nodes_that_differ_by_jitter_only_share_the_load() -> None:
    fleet = add(Fleet(), HELLO, status(running=1), "ws://a", 0.0002)
    add(fleet, HELLO, IDLE, "ws://b", 0.0006)
    assert chosen(fleet) == "ws://b"
    fleet.on_status("ws://a", IDLE, 0.0)
    fleet.on_rtt("ws://a", 0.0009)
    assert chosen(fleet) == "ws://a"


def test_a_node_not_measured_yet_counts_as_far() -> None:
    fleet = add(Fleet(), HELLO, IDLE, "ws://a", None)
    assert chosen(fleet) == "ws://a"
    add(fleet, HELLO, IDLE, "ws://b", 0.2)
    assert chosen(fleet) == "ws://b"
