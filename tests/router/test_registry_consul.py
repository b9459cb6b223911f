"""Discovery against the real Consul: what is healthy is found, and a Consul that dies and forgets heals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from router.registry import ConsulRegistry, ConsulTiming, NodeAddress, RouterAddress, RouterService

pytestmark = pytest.mark.e2e

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "consul" / "dev.hcl"
ROUTER = RouterService(name="r1", instance="abc", region="eu", host="127.0.0.1", port=8080)
TIMING = ConsulTiming(rest_s=0.01, recheck_s=0.05, backoff_first_s=0.05, backoff_most_s=0.2)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.02)


class Agent:
    """A dev agent: everything in memory, so a restart forgets every service."""

    def __init__(self, binary: Path) -> None:
        http, lan, wan, rpc = free_ports(4)
        self.address = f"http://127.0.0.1:{http}"
        flags = {"http-port": http, "serf-lan-port": lan, "serf-wan-port": wan, "server-port": rpc}
        self._command = [str(binary), "agent", "-dev", f"-config-file={CONFIG}", "-node=test"]
        self._command += [f"-{name}={value}" for name, value in flags.items()]
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        await until(self._leads)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def call(self, method: str, path: str, body: object = None) -> Any:
        async with aiohttp.ClientSession() as http, http.request(method, self.address + path, json=body) as answer:
            answer.raise_for_status()
            return await answer.json() if method == "GET" else None

    async def _leads(self) -> bool:
        try:
            return bool(await self.call("GET", "/v1/status/leader"))
        except aiohttp.ClientError:
            return False

    async def add_node(self, port: int, status: str) -> None:
        await self.call(
            "PUT",
            "/v1/agent/service/register",
            {
                "Name": "edgechat-node",
                "ID": f"node-{port}",
                "Address": "127.0.0.1",
                "Port": port,
                "Meta": {"name": f"n{port}", "region": "eu"},
                "Check": {"CheckID": f"check-{port}", "TTL": "1h", "Status": status},
            },
        )

    async def add_router(self, name: str, port: int, status: str) -> None:
        await self.call(
            "PUT",
            "/v1/agent/service/register",
            {
                "Name": "edgechat-router",
                "ID": f"edgechat-router-{name}-{port}",
                "Address": "127.0.0.1",
                "Port": port,
                "Meta": {"name": name, "instance": str(port), "region": "eu", "scheme": "http"},
                "Check": {"CheckID": f"check-{port}", "TTL": "1h", "Status": status},
            },
        )

    async def routers(self) -> set[str]:
        services = await self.call("GET", "/v1/agent/services")
        return {key for key, service in services.items() if service["Service"] == "edgechat-router"}


@pytest.fixture
def agent(consul_binary: Path) -> Iterator[Agent]:
    agent = Agent(consul_binary)
    yield agent
    agent.kill()


@contextlib.asynccontextmanager
async def running(agent: Agent) -> AsyncIterator[list[list[NodeAddress]]]:
    registry, lists = ConsulRegistry(agent.address, ROUTER, timing=TIMING), list[list[NodeAddress]]()
    task = asyncio.create_task(registry.run(lists.append, lambda _: None))
    try:
        yield lists
    finally:
        await registry.close()
        await task


def node(port: int) -> NodeAddress:
    return NodeAddress(f"ws://127.0.0.1:{port}/link", f"n{port}", "eu")


async def test_nodes_that_pass_are_found_and_critical_ones_dropped(agent: Agent) -> None:
    await agent.start()
    await agent.add_node(7001, "passing")
    await agent.add_node(7002, "critical")

    async with running(agent) as lists:

        async def now(*nodes: NodeAddress) -> None:
            async def reached() -> bool:
                return bool(lists) and lists[-1] == list(nodes)

            await until(reached)

        await now(node(7001))
        await agent.call("PUT", "/v1/agent/check/pass/check-7002")
        await now(node(7001), node(7002))
        await agent.call("PUT", "/v1/agent/check/fail/check-7001")
        await now(node(7002))
        await agent.call("PUT", "/v1/agent/service/deregister/node-7002")
        await now()
        checks = await agent.call("GET", "/v1/agent/checks")
        mine = next(check for check in checks.values() if check["ServiceID"] == ROUTER.id)
        assert mine["Type"] == "http"
    assert await agent.routers() == set(), "deregistered on close"


async def test_other_routers_that_pass_are_found_by_name_and_this_one_is_not_among_them(agent: Agent) -> None:
    await agent.start()
    await agent.add_router("r1", 8080, "passing")  # by its name, it is this one
    await agent.add_router("r2", 8082, "passing")
    await agent.add_router("r3", 8083, "critical")
    registry, lists = ConsulRegistry(agent.address, ROUTER, timing=TIMING), list[list[RouterAddress]]()
    task = asyncio.create_task(registry.run(lambda _: None, lists.append))

    async def now(*routers: RouterAddress) -> None:
        async def reached() -> bool:
            return bool(lists) and lists[-1] == list(routers)

        await until(reached)

    second, third = RouterAddress("r2", "http://127.0.0.1:8082"), RouterAddress("r3", "http://127.0.0.1:8083")
    anew = RouterAddress("r2", "http://127.0.0.1:8092")
    await now(second)
    await agent.call("PUT", "/v1/agent/check/pass/check-8083")
    await now(second, third)
    await agent.add_router("r2", 8092, "passing")  # started anew elsewhere, and the old one not yet thrown out
    await now(anew, third)
    await agent.call("PUT", "/v1/agent/check/fail/check-8092")
    await now(second, third)
    await agent.call("PUT", "/v1/agent/service/deregister/edgechat-router-r3-8083")
    await now(second)
    await registry.close()
    await task


async def test_a_killed_consul_that_comes_back_empty_heals(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "router.registry")

    async def registered() -> bool:
        return await agent.routers() == {ROUTER.id}

    async def noticed() -> bool:
        return "does not answer" in caplog.text

    async def recovered() -> bool:
        return "answers again" in caplog.text

    async with running(agent) as lists:  # Consul is down at the start
        await until(noticed)
        await agent.start()
        await agent.add_node(7001, "passing")

        async def found() -> bool:
            return bool(lists) and lists[-1] == [node(7001)]

        async def emptied() -> bool:
            return lists[-1] == []

        await until(found)
        await until(registered)
        await until(recovered)

        agent.kill()
        handed_out = len(lists)
        caplog.clear()
        await until(noticed)
        assert len(lists) == handed_out, "the last known nodes stay"

        await agent.start()
        await until(registered)
        await until(emptied)
        await agent.add_node(7001, "passing")  # as the node does for itself
        await until(found)
    assert sum("does not answer" in record.getMessage() for record in caplog.records) == 1
