"""Things that die between answers, and what is found through Consul. Each test has a fleet of its own.

What dies under an answer is in test_survival.py and test_router_loss.py.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.e2e.clients import MODEL, answer, check_log, raw_socket, receive, say, sdk, text_of
from tests.e2e.conftest import MakeFleet
from tests.e2e.processes import ROOT, Fleet
from tests.e2e.waiting import eventually, http

GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 24}


def running(fleet: Fleet) -> dict[str, int]:
    """Streams in each node, as the router last heard."""
    return {node["name"]: node["running"] for node in fleet.router.fleet()}


def first_turn(fleet: Fleet) -> tuple[str, str]:
    """Introduce ourselves; return the response's id and the name of the node that answered."""
    with raw_socket(fleet, extensions=True) as socket:
        say(socket, input="My name is Ada.", **GREEDY)
        node = ""
        while (event := receive(socket))["type"] not in {"response.completed", "response.incomplete"}:
            if event["type"] == "edgechat:node":
                node = event["node"]
    return event["response"]["id"], node


def second_turn(fleet: Fleet, response_id: str) -> str:
    """What a greedy second turn says; the same every time, whoever says it."""
    with raw_socket(fleet) as socket:
        events = answer(socket, input="What is my name?", previous_response_id=response_id, **GREEDY)
    check_log(events)
    return text_of(events)


def test_a_node_killed_between_turns_costs_nothing(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    response_id, name = first_turn(fleet)
    expected = second_turn(fleet, response_id)
    engine = fleet.node(name).engine()
    fleet.node(name).kill()
    assert second_turn(fleet, response_id) == expected
    eventually(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, what="the child ends too")
    fleet.node(name).restart()
    eventually(fleet.all_ready, what="the router finds the node again")


def test_an_engine_killed_between_turns_is_restarted_and_costs_nothing(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(nodes=["eu"])
    response_id, name = first_turn(fleet)
    expected = second_turn(fleet, response_id)
    before = fleet.node(name).kill_engine()
    eventually(lambda: fleet.router.fleet()[0]["engine_pid"] not in (0, before), 60, "a new engine child")
    eventually(fleet.all_ready, 60)
    assert second_turn(fleet, response_id) == expected


def test_without_any_node_a_request_is_told_to_come_back(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(nodes=["eu"])
    fleet.node("eu").kill()
    eventually(lambda: http(f"{fleet.url}/readyz", key=None).status == 503, what="the router is not ready")
    with pytest.raises(openai.APIStatusError) as refused:
        sdk(fleet).responses.create(model=MODEL, input="hi")
    assert refused.value.status_code == 503
    assert refused.value.code == "no_node_available"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    with raw_socket(fleet) as socket:
        say(socket, input="hi")
        event = receive(socket)
    assert (event["status"], event["code"]) == (503, "no_node_available")
    assert event["retry_after_ms"] > 0


def test_a_client_that_leaves_stops_its_unstored_answer(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(nodes=["eu"], router={"ROUTER__SESSION__ORPHAN_GRACE_S": "600"})
    with raw_socket(fleet) as socket:
        say(socket, input="Tell me a very long story.", store=False, temperature=0, max_output_tokens=2048)
        while receive(socket)["type"] != "response.output_text.delta":
            pass
        eventually(lambda: running(fleet)["eu"] == 1)
    eventually(lambda: running(fleet)["eu"] == 0, 5, "the node stops working for nobody")


def test_a_stored_answer_goes_on_without_its_client_until_the_grace_ends(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(nodes=["eu"], router={"ROUTER__SESSION__ORPHAN_GRACE_S": "3"})
    with raw_socket(fleet) as socket:
        say(socket, input="Tell me a very long story.", temperature=0, max_output_tokens=3000)
        response_id = receive(socket)["response"]["id"]
        while receive(socket)["type"] != "response.output_text.delta":
            pass
    eventually(lambda: running(fleet)["eu"] == 1, what="the node goes on")
    eventually(lambda: running(fleet)["eu"] == 0, what="the grace ends")
    kept = eventually(lambda: http(f"{fleet.base_url}/responses/{response_id}").json(), what="what there was is kept")
    assert kept["status"] == "cancelled"
    assert kept["output"][0]["content"][0]["text"]


def test_a_stored_answer_that_ends_within_the_grace_is_whole(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(nodes=["eu"])
    with raw_socket(fleet) as socket:
        say(socket, input="Name three rivers.", max_output_tokens=40)
        response_id = receive(socket)["response"]["id"]
    client: Any = sdk(fleet)

    def kept() -> Any:
        with contextlib.suppress(openai.NotFoundError):
            found = client.responses.retrieve(response_id)
            return found if found.status in {"completed", "incomplete"} else None
        return None

    assert eventually(kept).output_text


def test_consul_may_die_and_come_back_without_anyone_noticing(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    consul = fleet.consul
    assert consul is not None
    response_id, _ = first_turn(fleet)
    expected = second_turn(fleet, response_id)
    consul.kill()
    assert second_turn(fleet, response_id) == expected
    assert fleet.all_ready()
    consul.restart()
    eventually(lambda: len(consul.healthy("edgechat-node")) == 2, 60, "both nodes register again")
    eventually(lambda: len(consul.healthy("edgechat-router")) == 1, 60, "the router registers again")
    assert second_turn(fleet, response_id) == expected


def test_consul_down_at_the_start_is_waited_for(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(nodes=["eu"], start=False)
    consul, node = fleet.consul, fleet.node("eu")
    assert consul is not None
    consul.start().wait_ready()
    consul.kill()
    node.start().wait_ready()
    fleet.router.start()
    eventually(lambda: http(f"{fleet.url}/livez", key=None).status == 200, 60, "the router lives without Consul")
    assert http(f"{fleet.url}/readyz", key=None).status == 503
    consul.restart()
    eventually(fleet.all_ready, 60, "all find each other once Consul is there")


def test_a_node_that_stops_leaves_consul_and_ends_cleanly(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    consul = fleet.consul
    assert consul is not None
    eventually(lambda: len(consul.healthy("edgechat-node")) == 2)
    assert fleet.node("us").stop() == 0
    assert [service["Meta"]["region"] for service in consul.healthy("edgechat-node")] == ["eu"]
    assert fleet.router.stop() == 0
    assert consul.healthy("edgechat-router") == []


@pytest.mark.parametrize("program", ["router", "edge_node"])
def test_a_taken_port_is_one_line(make_fleet: MakeFleet, tmp_path: Path, program: str) -> None:
    fleet = make_fleet(nodes=["eu"], consul=False)
    taken = fleet.router if program == "router" else fleet.node("eu")
    section, file = ("ROUTER", "router.toml") if program == "router" else ("EDGE", "edge.toml")
    own = dict(taken.env())
    if program == "router":
        # Its store is taken as well, and is asked for first.
        own["ROUTER__STORE__PATH"] = str(tmp_path / "second.sqlite")
    second = subprocess.run(
        [sys.executable, "-m", program, "--config", f"configs/{file}"],
        cwd=ROOT,
        env={**psutil.Process().environ(), **own, f"{section}__LISTEN__PORT": str(taken.port)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 2
    said = second.stderr.strip().splitlines()
    assert len(said) == 1, said
    assert str(taken.port) in said[0]
