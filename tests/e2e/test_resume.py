"""Clients that vanish and come back for the rest, several readers of one answer, and answers nobody wants any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.e2e.clients import TERMINAL, check_log, raw_socket, receive, sdk, text_of
from tests.e2e.disasters import WiredFleet
from tests.e2e.hearing import Event, Listener, kept, listening, of_log, resumed, retrieved, several_clients, store_path
from tests.e2e.processes import Fleet
from tests.e2e.waiting import eventually, http

STORY: dict[str, Any] = {"input": "Tell me a long story.", "temperature": 0.8, "seed": 5, "max_output_tokens": 96}
# Whatever the model thinks of it: the ids that end an answer are out of its reach.
ENDLESS: dict[str, Any] = {
    "input": "Count to a million.",
    "temperature": 0.0,
    "max_output_tokens": 1900,
    "logit_bias": {"0": -100, "2": -100},
}


def begun(fleet: Fleet, events: int, **fields: Any) -> list[Event]:
    """The first events of an answer whose client then loses its connection; it goes on."""
    with listening(fleet, **fields) as listener:
        listener.until_seen(events)
    return listener.events


def response_id_of(events: list[Event]) -> str:
    return str(events[0]["response"]["id"])


def running(fleet: Fleet) -> int:
    """Streams in all nodes, as the router last heard."""
    return sum(node["running"] for node in fleet.router.fleet())


def test_a_client_that_lost_its_connection_gets_exactly_the_rest_from_the_sdk(three_nodes: WiredFleet) -> None:
    seen = begun(three_nodes, 20, **STORY)
    response_id = response_id_of(seen)
    whole = [*seen, *retrieved(three_nodes, response_id, starting_after=seen[-1]["sequence_number"])]
    heard = of_log(whole)
    assert heard.usage[1] == len(kept(three_nodes.router, response_id).ids) == STORY["max_output_tokens"]
    # After the end it is the same, from wherever one asks.
    assert [*retrieved(three_nodes, response_id)] == whole
    for number in (0, 19, len(whole) - 2, len(whole) - 1):
        assert [*retrieved(three_nodes, response_id, starting_after=number)] == whole[number + 1 :]
    assert sdk(three_nodes).responses.retrieve(response_id).output_text == heard.text


def test_a_client_resumes_on_a_new_websocket_while_the_answer_runs_and_after_it(three_nodes: WiredFleet) -> None:
    seen = begun(three_nodes, 20, **STORY)
    with raw_socket(three_nodes, extensions=True) as socket:
        listener = Listener(socket)
        listener.events += seen
        resumed(listener, response_id_of(seen), seen[-1]["sequence_number"])
        whole = listener.to_the_end().events
        assert listener.nodes, "it is not said who answers"
        again = Listener(socket)
        again.events += whole[:30]
        resumed(again, response_id_of(seen), 29)
        assert again.to_the_end().events == whole


def test_an_answer_survives_its_node_while_its_client_is_away(three_nodes: WiredFleet) -> None:
    with listening(three_nodes, **STORY) as listener:
        listener.until_seen(20)
    seen = listener.events
    three_nodes.node(listener.nodes[-1]).kill()
    rest = retrieved(three_nodes, response_id_of(seen), starting_after=seen[-1]["sequence_number"])
    heard = of_log([*seen, *rest])
    with listening(three_nodes, **STORY) as listener:
        assert listener.to_the_end().same() == heard.same()


def test_two_readers_of_one_answer_hear_the_same(three_nodes: WiredFleet) -> None:
    with several_clients() as client, listening(three_nodes, **STORY) as listener:
        listener.until_seen(20)
        response_id = response_id_of(listener.events)
        second = client(lambda: of_log([*retrieved(three_nodes, response_id)]))
        third = client(lambda: of_log([*listener.events[:11], *retrieved(three_nodes, response_id, 10)]))
        first = listener.to_the_end()
    assert first.events == second.result().events == third.result().events


def test_an_unstored_answer_cannot_be_come_back_for(three_nodes: WiredFleet) -> None:
    client: Any = sdk(three_nodes)
    with listening(three_nodes, **STORY, store=False) as listener:
        listener.until_seen(12)
        response_id = response_id_of(listener.events)
        for options in ({}, {"stream": True, "starting_after": 3}):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(response_id, **options)
        with raw_socket(three_nodes) as socket:
            resumed(Listener(socket), response_id, 3)
            refusal = receive(socket)
        assert (refusal["type"], refusal["status"], refusal["code"]) == ("error", 404, "response_not_found")
        # Its own connection hears nothing of that.
        check_log(listener.to_the_end().events)


def cancel_over_http(fleet: Fleet, listener: Listener) -> None:
    answer = http(f"{fleet.base_url}/responses/{response_id_of(listener.events)}/cancel", method="POST")
    assert (answer.status, answer.json()["status"]) == (200, "cancelled")


def cancel_over_websocket(fleet: Fleet, listener: Listener) -> None:
    listener.socket.send(f'{{"type": "response.cancel", "response_id": "{response_id_of(listener.events)}"}}')


@pytest.mark.parametrize("cancel", [cancel_over_http, cancel_over_websocket])
def test_a_cancelled_answer_stops_and_what_was_said_is_kept(
    three_nodes: WiredFleet, cancel: Callable[[Fleet, Listener], None]
) -> None:
    with listening(three_nodes, **ENDLESS) as listener:
        listener.until_seen(20)
        eventually(lambda: running(three_nodes) == 1)
        cancel(three_nodes, listener)
        heard = listener.to_the_end()
    assert (heard.events[-1]["type"], heard.finish) == ("response.incomplete", "cancelled")
    eventually(lambda: running(three_nodes) == 0, what="the node does not go on")
    stored = kept(three_nodes.router, heard.response_id)
    assert len(stored.ids) == heard.usage[1] < ENDLESS["max_output_tokens"]
    found = http(f"{three_nodes.base_url}/responses/{heard.response_id}").json()
    assert found["status"] == "cancelled"
    assert found["output"][0]["content"][0]["text"] == heard.text != ""


def stored_bytes(fleet: Fleet) -> bytes:
    """All that the router's store has on disk."""
    path = store_path(fleet.router)
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(f"{path.name}*")))


def test_a_deleted_answer_leaves_nothing_behind(three_nodes: WiredFleet) -> None:
    secret = "The password is chrysanthemum."
    with listening(three_nodes, **STORY | {"input": secret}) as listener:
        heard = listener.to_the_end()
    before = stored_bytes(three_nodes)
    assert secret.encode() in before and heard.response_id.encode() in before
    sdk(three_nodes).responses.delete(heard.response_id)
    after = stored_bytes(three_nodes)
    assert secret.encode() not in after and heard.response_id.encode() not in after
    assert http(f"{three_nodes.base_url}/responses/{heard.response_id}").status == 404


def test_an_answer_that_is_deleted_while_it_runs_leaves_nothing_behind(three_nodes: WiredFleet) -> None:
    secret = "The password is rhododendron."
    with listening(three_nodes, **ENDLESS | {"input": secret}) as listener:
        listener.until_seen(20)
        response_id = response_id_of(listener.events)
        assert secret.encode() in stored_bytes(three_nodes)
        sdk(three_nodes).responses.delete(response_id)
        listener.until(lambda event: event["type"] in TERMINAL)
    eventually(lambda: running(three_nodes) == 0, what="the node does not go on")
    after = stored_bytes(three_nodes)
    assert secret.encode() not in after and response_id.encode() not in after
    assert text_of(listener.events)
    with pytest.raises(openai.NotFoundError):
        sdk(three_nodes).responses.retrieve(response_id)
