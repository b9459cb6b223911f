"""The node in a real Consul, its engine a fake one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from edge_node.config import EdgeSettings
from edge_node.registry import SERVICE_NAME, Registry, Service
from tests.e2e.processes import Consul, free_port
from tests.e2e.waiting import eventually_async, http
from tests.edge_node.fake_engine import HOST, IDLE, RELEASE, FakeEngine, Served, settings_with

pytestmark = pytest.mark.e2e


@pytest.fixture
def consul(consul_binary: Path) -> Iterator[Consul]:
    agent = Consul(consul_binary)
    try:
        yield agent.start().wait_ready()
    finally:
        agent.close()


def known_to(consul: Consul) -> list[dict[str, Any]]:
    """The node's registrations, whatever their checks say."""
    services = http(f"{consul.url}/v1/agent/services", key=None).json()
    return [service for service in services.values() if service["Service"] == SERVICE_NAME]


def registering_at(consul: Consul) -> EdgeSettings:
    return settings_with(discovery={"consul": consul.url})


async def beating(engine: FakeEngine) -> None:
    while True:
        engine.say(IDLE)
        await asyncio.sleep(0.2)


async def test_a_node_is_found_in_consul_once_it_is_ready_and_leaves_when_it_stops(consul: Consul) -> None:
    async with Served(registering_at(consul)) as served:
        await eventually_async(lambda: known_to(consul))
        assert consul.healthy(SERVICE_NAME) == [], "it is still loading"
        heart = asyncio.create_task(beating(await served.engines.ready()))
        [service] = await eventually_async(lambda: asyncio.to_thread(consul.healthy, SERVICE_NAME))
        assert service["ID"] == f"eu-{served.node.instance}"
        assert (service["Address"], service["Port"]) == (HOST, served.port)
        assert service["Meta"] == {
            "name": "eu",
            "scheme": "ws",
            "region": "europe",
            "release": RELEASE,
            "variant": "test",
            "instance": served.node.instance,
        }
        heart.cancel()
    assert known_to(consul) == []


async def test_a_consul_that_has_forgotten_everything_learns_of_the_node_again(consul: Consul) -> None:
    async with Served(registering_at(consul)):
        await eventually_async(lambda: known_to(consul))
        consul.kill()
        consul.start()
        await eventually_async(lambda: known_to(consul))


async def test_a_node_without_its_consul_serves_and_complains_once(
    consul_binary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    consul = Consul(consul_binary)
    consul.ports = tuple(free_port() for _ in range(consul.ports_needed))
    with caplog.at_level(logging.INFO, "edge_node.registry"):
        try:
            async with Served(registering_at(consul)) as served:
                heart = asyncio.create_task(beating(await served.engines.ready()))
                await eventually_async(lambda: "consul_unreachable" in caplog.text)
                ready = await asyncio.to_thread(http, f"http://{HOST}:{served.port}/readyz", key=None)
                assert ready.status == 200
                consul.start()
                await eventually_async(lambda: "consul_registered" in caplog.text)
                await eventually_async(lambda: known_to(consul))
                heart.cancel()
        finally:
            consul.close()
    events = [record.getMessage().partition(" ")[0] for record in caplog.records if record.name == "edge_node.registry"]
    assert events == ["consul_unreachable", "consul_registered", "consul_reachable", "consul_deregistered"]


def test_readyz_is_checked_where_the_node_is_advertised() -> None:
    plain = Service("eu-1", "10.0.0.7", 7101, {}, tls=False)
    assert plain.check_url == "http://10.0.0.7:7101/readyz"
    secured = Service("eu-1", "fd00::7", 443, {}, tls=True)
    assert secured.check_url == "https://[fd00::7]:443/readyz"


def test_an_address_that_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"discovery\.consul"):
        Registry("http://:port", Service("eu-1", HOST, 7101, {}, tls=False))
