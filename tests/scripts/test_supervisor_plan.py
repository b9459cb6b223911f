"""What a local fleet is started with."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace

import pytest

from scripts.supervisor.plan import (
    ForeignConsul,
    OwnConsul,
    PlanError,
    Request,
    consul_address,
    consul_version,
    fleet,
    welcome,
)

REQUEST = Request(
    python="/venv/bin/python",
    root="/app",
    port=9000,
    nodes=("eu", "us"),
    discovery=OwnConsul("/usr/bin/consul", (1, 8)),
    release="/app/releases/smollm2-135m",
    model="smollm2-135m",
    threads=1,
)


def test_every_port_derives_from_one_and_none_is_used_twice() -> None:
    ports = {process.name: process.ports for process in fleet(REQUEST)}
    assert ports == {"consul": (9010, 9011, 9012, 9013), "eu": (9001,), "us": (9002,), "router": (9000,)}


def test_with_consul_everybody_is_told_where_it_is_and_the_static_list_is_empty() -> None:
    planned = {process.name: process for process in fleet(REQUEST)}
    assert planned["eu"].env["EDGE__DISCOVERY__CONSUL"] == "http://127.0.0.1:9010"
    assert planned["router"].env["ROUTER__DISCOVERY__CONSUL"] == "http://127.0.0.1:9010"
    assert planned["router"].env["ROUTER__DISCOVERY__STATIC"] == "[]"
    assert planned["eu"].after == planned["router"].after == ("consul",)


def test_without_consul_the_router_is_given_the_nodes_addresses() -> None:
    planned = {process.name: process for process in fleet(replace(REQUEST, discovery=None))}
    assert set(planned) == {"eu", "us", "router"}
    static = tomllib.loads(f"static = {planned['router'].env['ROUTER__DISCOVERY__STATIC']}")["static"]
    assert static == ["ws://127.0.0.1:9001", "ws://127.0.0.1:9002"]
    assert planned["router"].env["ROUTER__DISCOVERY__CONSUL"] == planned["eu"].env["EDGE__DISCOVERY__CONSUL"] == ""


def test_a_consul_that_runs_already_is_used_and_not_started() -> None:
    planned = {process.name: process for process in fleet(replace(REQUEST, discovery=ForeignConsul("http://c:8500")))}
    assert "consul" not in planned
    assert planned["us"].env["EDGE__DISCOVERY__CONSUL"] == "http://c:8500"


def test_a_new_consul_is_told_to_keep_its_second_grpc_port_shut() -> None:
    old, new = (
        next(process for process in fleet(replace(REQUEST, discovery=OwnConsul("consul", version))))
        for version in ((1, 8), (1, 21))
    )
    assert set(new.argv) - set(old.argv) == {"-grpc-tls-port=-1"}


def test_the_threads_of_a_node_can_be_chosen_from_outside() -> None:
    request = replace(REQUEST, environment={"EDGE__ENGINE__THREADS": "7"})
    assert {p.env["EDGE__ENGINE__THREADS"] for p in fleet(request) if p.name in ("eu", "us")} == {"7"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"port": 0}, "PORT=0 cannot be used"),
        ({"port": 65530}, "from 1024 to 65522"),
        ({"nodes": ("eu", "EU!")}, "'EU!' cannot be a node's name"),
        ({"nodes": ("eu", "router")}, "'router' cannot be a node's name"),
        ({"nodes": ("eu", "eu")}, "names a node twice: eu,eu"),
        ({"nodes": ("",)}, "'' cannot be a node's name"),
        ({"nodes": tuple(f"n{i}" for i in range(10))}, "names 10 nodes: name 1 to 9"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused_in_one_sentence(change: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=re.escape(words)) as refusal:
        fleet(replace(REQUEST, **change))  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


def test_the_variable_of_consuls_own_tools_is_understood() -> None:
    assert consul_address("127.0.0.1:8500") == "http://127.0.0.1:8500"
    assert consul_address("https://consul.example:8501/") == "https://consul.example:8501"
    with pytest.raises(PlanError, match="unix:///run/consul"):
        consul_address("unix:///run/consul.sock")


def test_what_does_not_speak_as_consul_does_is_not_started() -> None:
    assert consul_version("Consul v1.8.7\nProtocol 2 spoken") == (1, 8)
    assert consul_version("Consul v1.21.0-dev") == (1, 21)
    with pytest.raises(PlanError, match="check CONSUL="):
        consul_version("")


def test_the_welcome_names_the_address_the_model_and_the_way_nodes_are_found() -> None:
    assert 'model="mine"' in welcome(replace(REQUEST, model="mine"))
    assert "http://127.0.0.1:9000/v1" in welcome(REQUEST)
    assert "static list" in welcome(replace(REQUEST, discovery=None))
    assert "Consul at http://c:8500" in welcome(replace(REQUEST, discovery=ForeignConsul("http://c:8500")))
