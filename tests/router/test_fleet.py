from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from core.frames import PROTOCOL, SPEECH_VERSION, Hello, Rates, Status
from router.fleet import FORGET_DOWN_AFTER_S, MAX_CHAINS, SUSPECT_AFTER_S, Fleet, State
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
    assert (row.rtt_ms, row.chains) == (10.0, 0)


def test_what_a_nodes_prefix_store_holds_follows_its_changes() -> None:
    fleet = fleet_of(status=status(chains=[("a", 64), ("b", 128)]))
    node = fleet.nodes["ws://eu"]
    assert [node.resident_tokens(keys) for keys in (["a"], ["a", "b"], ["a", "b", "c"], ["c"], [])] == [
        64,
        128,
        128,
        0,
        0,
    ]
    fleet.on_status("ws://eu", STATUS, 1.0)
    assert node.resident_tokens(["a", "b"]) == 128, "a Status says what has changed, not what is"
    fleet.on_status("ws://eu", status(chains=[("b", 0), ("a", 192), ("never told", 0)]), 2.0)
    assert node.resident_tokens(["a", "b"]) == 192
    assert fleet.rows(2.0)[0].chains == 1


def test_of_more_chains_than_a_node_may_have_the_oldest_are_forgotten() -> None:
    fleet = fleet_of(status=status(chains=[(f"{key}", 64) for key in range(MAX_CHAINS)]))
    fleet.on_status("ws://eu", status(chains=[("0", 128), ("new", 64)]), 1.0)
    node = fleet.nodes["ws://eu"]
    assert [node.resident_tokens([key]) for key in ("0", "1", "2", "new")] == [128, 0, 64, 64]
    assert len(node.chains) == MAX_CHAINS


def test_a_lost_link_and_a_new_hello_empty_what_is_known_of_a_nodes_prefix_store() -> None:
    fleet = fleet_of(status=status(chains=[("a", 64)]))
    fleet.on_down("ws://eu", 1.0)
    assert fleet.rows(1.0)[0].chains == 0
    fleet = fleet_of(status=status(chains=[("a", 64)]))
    fleet.on_up("ws://eu", HELLO, 1.0)
    assert fleet.rows(1.0)[0].chains == 0


def two(near: Status, far: Status) -> Fleet:
    fleet = add(Fleet(), HELLO, near, "ws://near", 0.010)
    return add(fleet, HELLO, far, "ws://far", 0.050)


def chosen(
    fleet: Fleet, model: str = "tiny", exclude: frozenset[str] = frozenset(), keys: Sequence[str] = ()
) -> str | None:
    choice = choose(fleet.ready(0.0), model, exclude, lambda release: keys)
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


def twins(a: Status, b: Status) -> Fleet:
    """Two equally near nodes."""
    return add(add(Fleet(), HELLO, a, "ws://a", 0.010), HELLO, b, "ws://b", 0.010)


def test_of_equally_near_nodes_the_one_that_holds_most_of_the_conversation_is_chosen() -> None:
    fleet = twins(status(running=0, chains=[("k1", 64)]), status(running=1, chains=[("k1", 64), ("k2", 128)]))
    assert chosen(fleet, keys=["k1", "k2", "k3"]) == "ws://b"
    assert chosen(fleet, keys=["k1"]) == "ws://a", "as much here as there: the emptier"
    assert chosen(fleet, keys=["other"]) == "ws://a"


def test_a_node_that_holds_the_conversation_is_neither_waited_for_nor_gone_far_for() -> None:
    holding = [("k1", 640)]
    assert chosen(twins(IDLE, status(running=2, chains=holding)), keys=["k1"]) == "ws://a"
    assert chosen(two(IDLE, status(running=0, chains=holding)), keys=["k1"]) == "ws://near"
    full = twins(status(running=2, waiting=1, chains=holding), FULL)
    assert chosen(full, keys=["k1"]) == "ws://b"


def test_a_conversations_keys_are_asked_for_under_the_release_that_the_node_serves() -> None:
    newer = msgspec.structs.replace(HELLO, releases=["tiny@ffffffffffff"])
    keys = {"tiny@0123456789ab": ["old"], "tiny@ffffffffffff": ["new"]}
    fleet = add(Fleet(), HELLO, status(running=0, chains=[("new", 64)]), "ws://a", 0.010)
    add(fleet, newer, status(running=0, chains=[("new", 64)]), "ws://b", 0.010)
    choice = choose(fleet.ready(0.0), "tiny", prefix_keys=keys.__getitem__)
    assert choice is not None
    assert choice.node.url == "ws://b"


def test_where_there_is_no_choice_no_keys_are_made() -> None:
    def asked(release: str) -> Sequence[str]:
        raise AssertionError

    assert choose(two(IDLE, IDLE).ready(0.0), "tiny", prefix_keys=asked) is not None


def test_who_gives_way_gets_a_free_slot_or_nothing() -> None:
    assert choose(two(FULL, IDLE).ready(0.0), "tiny", yields=True) is not None
    assert choose(two(FULL, FULL).ready(0.0), "tiny", yields=True) is None


def test_those_who_give_way_keep_nobody_out() -> None:
    flooded = status(running=2, waiting=2, yielding=3)
    assert chosen(two(flooded, status(running=2, waiting=2))) == "ws://near"
    assert chosen(two(flooded, FULL)) == "ws://near", "one that stays against two"
    assert chosen(two(status(running=2, waiting=2, yielding=0), status(running=2, waiting=2))) is None
