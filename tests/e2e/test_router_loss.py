"""Routers that are killed or restarted while they answer: what a client saw stays true, and it gets the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from tests.e2e.clients import raw_socket, sdk
from tests.e2e.conftest import MakeRouter
from tests.e2e.disasters import WiredFleet
from tests.e2e.hearing import Event, Heard, Listener, kept, listening, of_log, over_websocket, resumed
from tests.e2e.processes import HOST, Fleet, Redis, free_port
from tests.e2e.waiting import eventually, http

STORY: dict[str, Any] = {"input": "Tell me a long story.", "temperature": 0.8, "seed": 5, "max_output_tokens": 96}
PATIENCE = 20
"""How often the SDK asks again where it is told to come back later."""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path)
    yield server.start().wait_ready()
    server.close()


@pytest.fixture(scope="module")
def whole(_three_nodes: WiredFleet) -> Heard:
    """The story as it is told when nothing happens."""
    _three_nodes.mend()
    return over_websocket(_three_nodes, **STORY)


def rest_from_sdk(fleet: Fleet, seen: list[Event]) -> Heard:
    """What was seen and what the SDK gets for `starting_after`, as one log."""
    client: Any = sdk(fleet).with_options(timeout=120, max_retries=PATIENCE)
    response_id, last = seen[0]["response"]["id"], seen[-1]["sequence_number"]
    with client.responses.retrieve(response_id, stream=True, starting_after=last) as stream:
        return of_log([*seen, *(event.to_dict() for event in stream)])


def all_that_came(listener: Listener) -> list[Event]:
    """Read a connection to its end: nothing of what it brought may be un-said."""
    with pytest.raises(ConnectionClosed):
        while True:
            listener.next()
    return listener.events


def test_a_router_killed_mid_answer_goes_on_when_it_is_back(
    three_nodes: WiredFleet, make_router: MakeRouter, whole: Heard
) -> None:
    fleet = make_router("killed")
    with listening(fleet, **STORY) as listener:
        listener.until_seen(20)
        fleet.router.kill()
        seen = all_that_came(listener)
    fleet.router.restart()
    heard = rest_from_sdk(fleet, seen)
    assert heard.same() == whole.same()
    assert kept(fleet.router, heard.response_id).ids == kept(three_nodes.router, whole.response_id).ids


def test_a_router_that_is_restarted_on_purpose_goes_on_afterwards(make_router: MakeRouter, whole: Heard) -> None:
    fleet = make_router("restarted")
    with listening(fleet, **STORY) as listener:
        listener.until_seen(20)
        assert fleet.router.stop() == 0
        seen = all_that_came(listener)
    fleet.router.restart()
    with raw_socket(fleet, extensions=True) as socket:
        listener = Listener(socket)
        listener.events += seen
        resumed(listener, seen[0]["response"]["id"], seen[-1]["sequence_number"])
        assert listener.to_the_end().same() == whole.same()


def test_another_router_on_the_same_redis_takes_over_from_one_that_was_killed(
    make_router: MakeRouter, redis: Redis, whole: Heard
) -> None:
    settings = {"ROUTER__STORE__REDIS": redis.redis_url}
    one, other = make_router("one", settings=settings), make_router("other", settings=settings)
    with listening(one, **STORY) as listener:
        listener.until_seen(20)
        one.router.kill()
        seen = all_that_came(listener)
    # Until the lease is over nobody may take it; the SDK is told when to come back.
    heard = rest_from_sdk(other, seen)
    assert heard.same() == whole.same()
    # Had another router begun it anew, its id would name that one.
    assert heard.response_id.startswith("resp_one_")
    one.router.restart()
    assert rest_from_sdk(one, seen).events == heard.events


def test_a_router_asked_for_anothers_answer_passes_on_what_that_one_says(make_router: MakeRouter, whole: Heard) -> None:
    ports = {"holder": free_port(), "asked": free_port()}
    known = {"ROUTER__DISCOVERY__ROUTERS": json.dumps([f"{name}=http://{HOST}:{ports[name]}" for name in ports])}
    holder, asked = (make_router(name, settings=known, port=port) for name, port in ports.items())
    with listening(holder, **STORY) as listener:
        listener.until_seen(20)
    heard = rest_from_sdk(asked, listener.events)
    assert heard.same() == whole.same()
    with raw_socket(asked) as socket:
        again = Listener(socket)
        again.events += heard.events[:40]
        resumed(again, heard.response_id, 39)
        assert again.to_the_end().events == heard.events
    # A conversation goes on wherever it was begun, with the very ids.
    more = {
        "input": "And then?",
        "previous_response_id": heard.response_id,
        "temperature": 0.0,
        "max_output_tokens": 16,
    }
    assert over_websocket(asked, **more).same() == over_websocket(holder, **more).same()
    holder.router.kill()
    gone = http(f"{asked.base_url}/responses/{heard.response_id}")
    assert (gone.status, gone.json()["error"]["code"]) == (503, "router_unreachable")
    assert int(gone.headers["retry-after"]) >= 1
    holder.router.restart()
    found = eventually(lambda: http(f"{asked.base_url}/responses/{heard.response_id}").json()["output"])
    assert found[0]["content"][0]["text"] == whole.text
