"""Disasters under running answers: three real nodes, a real model, clients of three kinds.

What they hear is held against an undisturbed answer to the same request: the same text, ids and usage, one log.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.e2e.conftest import MakeRouter
from tests.e2e.disasters import DISASTERS, NEVER_S, WiredFleet, WiredNode, go_on, kill_engine, kill_parent
from tests.e2e.hearing import (
    Event,
    Heard,
    ids_at_the_move,
    kept,
    listening,
    over_chat,
    over_sse,
    over_websocket,
    retrieved,
    several_clients,
    written,
)
from tests.e2e.processes import Fleet

TOKENS = 64
GREEDY: dict[str, Any] = {"temperature": 0.0, "edgechat:exact": True, "max_output_tokens": TOKENS}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 11, "max_output_tokens": TOKENS}
STORY: dict[str, Any] = {"input": "Tell me a story about a river and the people who live beside it.", **SAMPLED}
CASES = [STORY, {"input": "List twenty animals that live in the sea, and say a sentence about each.", **GREEDY}]
# Most of their ids are a part of a character.
SYMBOLS = "".join(map(chr, [*range(0x1F980, 0x1F9A0), *range(0x6F22, 0x6F32)]))
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer"},
        "likes": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 3, "maxItems": 5},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


class Undisturbed:
    """What is heard when nothing happens, asked for once for each request."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[Heard, list[int]]] = {}

    def __call__(self, fleet: Fleet, **fields: Any) -> tuple[Heard, list[int]]:
        """The answer and its ids."""
        key = json.dumps(fields, sort_keys=True)
        if key not in self._heard:
            heard = over_websocket(fleet, **fields)
            self._heard[key] = heard, kept(fleet.router, heard.response_id).ids
        return self._heard[key]


@pytest.fixture(scope="module")
def undisturbed() -> Undisturbed:
    return Undisturbed()


def check(fleet: Fleet, heard: Heard, expected: tuple[Heard, list[int]]) -> None:
    """Not a token more, less or other than it would have been; and so it is kept, if it is."""
    answer, ids = expected
    assert heard.same() == answer.same()
    if heard.response_id:
        assert kept(fleet.router, heard.response_id).ids == ids


def one_random_case(fleet: WiredFleet, undisturbed: Undisturbed, seed: int) -> None:
    """Something happens to the node of a WebSocket client while two others are listening, too; or to two nodes.

    Sometimes the first comes to life again, if it can, while another is answering in its place.
    """
    dice = random.Random(seed)
    case = dice.choice(CASES)
    expected = undisturbed(fleet, **case)
    moment = dice.randrange(1, len(expected[0].events) * 6 // 10)
    disasters = [DISASTERS[seed % len(DISASTERS)]]
    if dice.random() < 0.5:
        disasters.append(DISASTERS[(seed + 3) % len(DISASTERS)])
    told = f"{[disaster.__name__ for disaster in disasters]} when {moment} events were seen of {case}"
    with several_clients() as client:
        others = [client(over_sse, fleet, **case), client(over_chat, fleet, **case)]
        with listening(fleet, **case) as listener:
            listener.until_seen(moment)
            first = listener.nodes[-1]
            struck = [first, *dice.sample([name for name in fleet.nodes if name != first], 2)]
            for name, disaster in zip(struck, disasters, strict=False):
                disaster(fleet.node(name))
            if dice.random() < 0.5:
                listener.until(lambda event: event["type"] == "edgechat:node")
                fleet.node(first).wire.heal()
                if fleet.node(first).running:
                    go_on(fleet.node(first))
            heard = listener.to_the_end()
    assert len(heard.nodes) >= 2, f"{told}: the answer came from {heard.nodes}"
    for each in (heard, *(other.result() for other in others)):
        check(fleet, each, expected)


@pytest.mark.parametrize("seed", range(10))
def test_a_disaster_at_a_random_moment_changes_nothing(
    three_nodes: WiredFleet, undisturbed: Undisturbed, seed: int
) -> None:
    one_random_case(three_nodes, undisturbed, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_disasters_at_random_moments_change_nothing(three_nodes: WiredFleet, undisturbed: Undisturbed) -> None:
    for seed in range(100, 150):
        three_nodes.mend()
        one_random_case(three_nodes, undisturbed, seed)


def answering(fleet: WiredFleet, nodes: list[str]) -> WiredNode:
    """The node that answers now."""
    return fleet.node(nodes[-1])


def test_a_node_lost_while_it_reads_a_long_prompt_is_replaced(three_nodes: WiredFleet) -> None:
    fields = {"input": "It was a long day at the harbour. " * 180 + "What was it?", **SAMPLED, "max_output_tokens": 16}

    def reading(event: Event) -> bool:
        return bool(event["type"] == "edgechat:progress" and 0 < event["computed"] < event["total"])

    with listening(three_nodes, **fields) as listener:
        listener.until(reading)
        kill_engine(answering(three_nodes, listener.nodes))
        # Nothing was said before, so it is all the second node's.
        assert [event["type"] for event in listener.events] == ["response.created", "response.in_progress"]
        heard = listener.to_the_end()
    assert len(heard.nodes) == 2
    # Now, lest the other node had known the prompt.
    again = over_websocket(three_nodes, **fields)
    assert heard.same() == again.same()
    assert kept(three_nodes.router, heard.response_id).ids == kept(three_nodes.router, again.response_id).ids


def test_a_node_lost_inside_a_character_is_replaced(three_nodes: WiredFleet, undisturbed: Undisturbed) -> None:
    schema = {"type": "object", "properties": {"symbols": {"const": SYMBOLS}}, "required": ["symbols"]}
    form = {"format": {"type": "json_schema", "name": "symbols", "schema": schema, "strict": True}}
    fields = {"input": "Symbols, please.", **GREEDY, "text": form, "max_output_tokens": 256}
    expected = undisturbed(three_nodes, **fields)
    assert SYMBOLS in json.loads(expected[0].text)["symbols"]
    said = kept(three_nodes.router, expected[0].response_id).deltas
    with listening(three_nodes, **fields) as listener:
        listener.until_seen(20)
        response_id = listener.events[0]["response"]["id"]
        while said[written(three_nodes.router, response_id) - 1]:
            pass
        answering(three_nodes, listener.nodes).wire.reset()
        heard = listener.to_the_end()
    assert len(heard.nodes) == 2
    assert not said[ids_at_the_move(three_nodes, response_id) - 1]
    check(three_nodes, heard, expected)


def test_a_node_lost_inside_an_answer_in_a_form_leaves_it_in_that_form(
    three_nodes: WiredFleet, undisturbed: Undisturbed
) -> None:
    form = {"format": {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}}
    fields = {"input": "Describe a person as JSON.", **SAMPLED, "text": form, "max_output_tokens": 256}
    expected = undisturbed(three_nodes, **fields)
    with listening(three_nodes, **fields) as listener:
        listener.until_seen(len(expected[0].events) // 2)
        answering(three_nodes, listener.nodes).wire.reset()
        heard = listener.to_the_end()
    assert len(heard.nodes) == 2
    check(three_nodes, heard, expected)
    assert list(json.loads(heard.text)) == ["name", "age", "likes"]


@pytest.mark.parametrize("disaster", [kill_parent, kill_engine])
def test_an_answer_waits_for_its_only_node_to_be_back(
    three_nodes: WiredFleet, make_router: MakeRouter, undisturbed: Undisturbed, disaster: Any
) -> None:
    expected = undisturbed(three_nodes, **STORY)
    alone = make_router("alone", nodes=["eu"], settings={"ROUTER__SESSION__FAILOVER_WAIT_S": NEVER_S})
    node = three_nodes.node("eu")
    with listening(alone, **STORY) as listener:
        listener.until_seen(20)
        disaster(node)
        if not node.running:
            node.start()
        check(alone, listener.to_the_end(), expected)


def test_an_answer_that_waited_in_vain_fails_retryably_and_what_was_said_is_kept(
    three_nodes: WiredFleet, make_router: MakeRouter
) -> None:
    alone = make_router("alone", nodes=["eu"], settings={"ROUTER__SESSION__FAILOVER_WAIT_S": "1"})
    with listening(alone, **STORY) as listener:
        listener.until_seen(20)
        kill_parent(three_nodes.node("eu"))
        heard = listener.to_the_end()
    assert heard.finish == "failed node_lost"
    response = heard.events[-1]["response"]
    assert response["error"]["retryable"] is True
    assert heard.text == response["output"][0]["content"][0]["text"] != ""
    assert [*retrieved(alone, heard.response_id)] == heard.events
    assert len(kept(alone.router, heard.response_id).ids) == heard.usage[1] > 0


def test_a_request_under_which_two_engines_die_is_not_tried_a_third_time(three_nodes: WiredFleet) -> None:
    with listening(three_nodes, **STORY) as listener:
        listener.until_seen(12)
        kill_engine(answering(three_nodes, listener.nodes))
        listener.until(lambda event: event["type"] == "edgechat:node")
        listener.next()
        kill_engine(answering(three_nodes, listener.nodes))
        heard = listener.to_the_end()
    assert heard.finish == "failed poisoned_request"
    assert heard.events[-1]["response"]["error"]["retryable"] is False
    assert len(heard.nodes) == len({*heard.nodes}) == 2


def test_a_node_that_is_asked_to_stop_hands_its_answers_over(three_nodes: WiredFleet, undisturbed: Undisturbed) -> None:
    expected = undisturbed(three_nodes, **STORY)
    with listening(three_nodes, **STORY) as listener:
        listener.until_seen(12)
        # It would wait for its answers for longer than this test does.
        assert answering(three_nodes, listener.nodes).stop() == 0
        heard = listener.to_the_end()
    assert len(heard.nodes) == 2
    check(three_nodes, heard, expected)
