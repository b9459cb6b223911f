"""Discovery without Consul: what is pure, the static list, and an HTTP server that answers as Consul would."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
from aiohttp import web

from core.errors import ConfigError
from router.registry import (
    ConsulRegistry,
    ConsulTiming,
    NodeAddress,
    RouterAddress,
    RouterService,
    StaticRegistry,
    next_index,
    node_addresses,
    router_addresses,
)

ROUTER = RouterService(name="r1", instance="abc", region="eu", host="127.0.0.1", port=8080)
FAST = ConsulTiming(rest_s=0.001, recheck_s=0.005, backoff_first_s=0.001, backoff_most_s=0.005)


def entry(address: str, port: int, **meta: str) -> dict[str, object]:
    return {
        "Node": {"Node": "agent", "Address": "10.0.0.9"},
        "Service": {"ID": f"n{port}", "Address": address, "Port": port, "Meta": meta or None},
        "Checks": [],
    }


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.001)


# -- pure --------------------------------------------------------------------------------------


def test_addresses_come_in_a_stable_order_with_what_the_node_said_about_itself() -> None:
    found = node_addresses([entry("10.0.0.2", 2, name="us-1", region="us"), entry("10.0.0.1", 1)])
    assert found == [
        NodeAddress("ws://10.0.0.1:1/link", "", ""),
        NodeAddress("ws://10.0.0.2:2/link", "us-1", "us"),
    ]


@pytest.mark.parametrize(
    ("service", "url"),
    [
        (entry("", 1), "ws://10.0.0.9:1/link"),
        (entry("::1", 1), "ws://[::1]:1/link"),
        (entry("a.example", 1, scheme="wss"), "wss://a.example:1/link"),
        (entry("a.example", 1, scheme="https"), "wss://a.example:1/link"),
        (entry("a.example", 1, scheme="http"), "ws://a.example:1/link"),
    ],
)
def test_an_address_is_written_as_a_url(service: dict[str, object], url: str) -> None:
    assert [address.url for address in node_addresses([service])] == [url]


def test_a_node_registered_twice_is_one_node() -> None:
    assert len(node_addresses([entry("10.0.0.1", 1), entry("10.0.0.1", 1)])) == 1


def test_an_answer_of_another_shape_is_an_error() -> None:
    with pytest.raises(msgspec.ValidationError):
        node_addresses([{"Service": {}}])


@pytest.mark.parametrize(("before", "answered", "next_"), [(0, 5, 5), (5, 9, 9), (9, 9, 9), (9, 3, 0), (0, 0, 1)])
def test_an_index_that_went_backwards_starts_over(before: int, answered: int, next_: int) -> None:
    assert next_index(before, answered) == next_


def router_entry(name: str, port: int, created: int = 0, **meta: str) -> dict[str, object]:
    service = entry("10.0.0.1", port, **({"name": name} | meta))
    service["Service"] |= {"CreateIndex": created}  # type: ignore[operator]
    return service


def test_routers_come_by_name_with_the_scheme_they_speak() -> None:
    assert router_addresses([router_entry("b", 2, scheme="https"), router_entry("a", 1, scheme="http")]) == [
        RouterAddress("a", "http://10.0.0.1:1"),
        RouterAddress("b", "https://10.0.0.1:2"),
    ]


def test_of_two_instances_of_a_router_the_one_that_started_last_counts() -> None:
    entries = [router_entry("a", 2, created=9), router_entry("a", 1, created=4)]
    assert router_addresses(entries) == [RouterAddress("a", "http://10.0.0.1:2")]


@pytest.mark.parametrize("name", ["", "A", "a_b", "../a", "a\n"])
def test_a_router_whose_name_can_be_in_no_id_owns_no_response(name: str) -> None:
    assert router_addresses([router_entry(name, 1)]) == []


# -- the static lists --------------------------------------------------------------------------


async def test_the_static_list_is_handed_out_once_and_stays_until_closed() -> None:
    registry = StaticRegistry(["ws://127.0.0.1:8081", "wss://a.example/other", "ws://127.0.0.1:8081"])
    lists: list[list[NodeAddress]] = []
    running = asyncio.create_task(registry.run(lists.append, lambda _: None))
    await until(lambda: bool(lists))
    await registry.close()
    await running
    assert [[address.url for address in addresses] for addresses in lists] == [
        ["ws://127.0.0.1:8081/link", "wss://a.example/other"]
    ]


async def test_routers_with_a_name_are_handed_out_except_this_one() -> None:
    listed = ["eu=http://10.0.0.1:8080", "https://only-shown.example/?a=b", "us=https://us.example/", "me=http://a:1"]
    registry = StaticRegistry([], listed, own_name="me")
    lists: list[list[RouterAddress]] = []
    running = asyncio.create_task(registry.run(lambda _: None, lists.append))
    await until(lambda: bool(lists))
    await registry.close()
    await running
    assert lists == [[RouterAddress("eu", "http://10.0.0.1:8080"), RouterAddress("us", "https://us.example")]]


@pytest.mark.parametrize("url", ["http://a:1", "ws://", "127.0.0.1:8081", "ws://a:99999", "ws://a:0"])
def test_a_static_address_that_is_none_is_refused_with_its_key(url: str) -> None:
    with pytest.raises(ConfigError, match=r"discovery\.static holds .*; write ws://host:port"):
        StaticRegistry([url])


@pytest.mark.parametrize("address", ["127.0.0.1:8500", "ftp://a", "http://", "http://a:x"])
def test_a_consul_address_that_is_none_is_refused_with_its_key(address: str) -> None:
    with pytest.raises(ConfigError, match=r"discovery\.consul is"):
        ConsulRegistry(address, ROUTER)


# -- against a fake Consul ---------------------------------------------------------------------


class FakeConsul:
    """Answers what the registry asks. `answers`: (index, entries) to come, the last stays."""

    def __init__(self) -> None:
        self.queries: list[tuple[str | None, str | None, str | None]] = []
        self.answers: list[tuple[int, list[dict[str, object]]]] = [(1, [])]
        self.routers: list[dict[str, object]] = []
        self.services: dict[str, dict[str, object]] = {}
        self.registrations: list[dict[str, object]] = []
        self.broken = False
        self.nonsense: str | None = None
        self.misled: set[str] = set()

    async def health(self, request: web.Request) -> web.Response:
        if self.broken:
            return web.Response(status=500, text="No cluster leader")
        if self.nonsense is not None:
            self.misled.add("nodes")
            return web.Response(text=self.nonsense, headers={"X-Consul-Index": "7"})
        query = request.query
        self.queries.append((query.get("index"), query.get("wait"), query.get("passing")))
        if len(self.answers) == 1 and query.get("index") == str(self.answers[0][0]):
            await asyncio.sleep(0.005)
        index, entries = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.json_response(entries, headers={"X-Consul-Index": str(index)})

    async def health_of_routers(self, _request: web.Request) -> web.Response:
        if self.broken:
            return web.Response(status=500, text="No cluster leader")
        await asyncio.sleep(0.005)
        return web.json_response(self.routers, headers={"X-Consul-Index": "1"})

    async def list(self, _request: web.Request) -> web.Response:
        if self.nonsense is not None:
            self.misled.add("registration")
            return web.Response(text=self.nonsense)
        return web.Response(status=500) if self.broken else web.json_response(self.services)

    async def register(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        self.registrations.append(body)
        self.services[body["id"]] = body
        return web.Response()

    async def deregister(self, request: web.Request) -> web.Response:
        self.services.pop(request.match_info["id"], None)
        return web.Response()


@contextlib.asynccontextmanager
async def fake_consul() -> AsyncIterator[tuple[FakeConsul, str]]:
    fake, app = FakeConsul(), web.Application()
    app.router.add_get("/v1/health/service/edgechat-node", fake.health)
    app.router.add_get("/v1/health/service/edgechat-router", fake.health_of_routers)
    app.router.add_get("/v1/agent/services", fake.list)
    app.router.add_put("/v1/agent/service/register", fake.register)
    app.router.add_put("/v1/agent/service/deregister/{id}", fake.deregister)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield fake, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def running(address: str) -> AsyncIterator[list[list[NodeAddress]]]:
    registry, lists = ConsulRegistry(address, ROUTER, timing=FAST), list[list[NodeAddress]]()
    task = asyncio.create_task(registry.run(lists.append, lambda _: None))
    try:
        yield lists
    finally:
        await registry.close()
        await task


async def test_every_query_after_the_first_blocks_on_the_index_before_it() -> None:
    async with fake_consul() as (fake, address):
        fake.answers = [(50, []), (60, []), (10, []), (11, [])]
        async with running(address):
            await until(lambda: len(fake.queries) >= 6)
    assert fake.queries[:5] == [
        (None, None, "1"),
        ("50", "30s", "1"),
        ("60", "30s", "1"),
        (None, None, "1"),  # 10 came after 60: Consul lost its memory
        ("11", "30s", "1"),
    ]


async def test_the_list_is_handed_out_at_first_and_at_every_change_only() -> None:
    one, two = entry("10.0.0.1", 1), entry("10.0.0.2", 2)
    async with fake_consul() as (fake, address):
        fake.answers = [(1, []), (2, [one]), (3, [one]), (4, [two, one]), (5, [one, two]), (6, [two])]
        async with running(address) as lists:
            await until(lambda: len(fake.queries) >= 8)
    first, second = node_addresses([one])[0], node_addresses([two])[0]
    assert lists == [[], [first], [first, second], [second]]


async def test_other_routers_are_handed_out_as_they_come_and_go() -> None:
    lists: list[list[RouterAddress]] = []
    async with fake_consul() as (fake, address):
        registry = ConsulRegistry(address, ROUTER, timing=FAST)
        task = asyncio.create_task(registry.run(lambda _: None, lists.append))
        await until(lambda: lists == [[]])
        fake.routers = [router_entry("r1", 1), router_entry("r2", 2)]
        await until(lambda: len(lists) == 2)
        fake.routers = [router_entry("r1", 1)]
        await until(lambda: len(lists) == 3)
        await registry.close()
        await task
    assert lists == [[], [RouterAddress("r2", "http://10.0.0.1:2")], []]


async def test_the_router_registers_with_its_check_and_deregisters_on_close() -> None:
    async with fake_consul() as (fake, address):
        async with running(address):
            await until(lambda: bool(fake.services))
            (registered,) = fake.services.values()
            assert registered == {
                "name": "edgechat-router",
                "id": "edgechat-router-r1-abc",
                "address": "127.0.0.1",
                "port": 8080,
                "meta": {"name": "r1", "instance": "abc", "region": "eu", "scheme": "http"},
                "checks": [
                    {
                        "http": "http://127.0.0.1:8080/livez",
                        "interval": "5s",
                        "timeout": "2s",
                        "tls_skip_verify": True,
                        "DeregisterCriticalServiceAfter": "1m",
                    }
                ],
            }
        assert fake.services == {}
        assert len(fake.registrations) == 1


async def test_a_registration_that_consul_forgot_is_made_again() -> None:
    async with fake_consul() as (fake, address), running(address):
        await until(lambda: bool(fake.services))
        fake.services.clear()
        await until(lambda: bool(fake.services))


async def test_while_consul_fails_the_last_list_stays_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "router.registry")
    async with fake_consul() as (fake, address):
        fake.answers = [(1, [entry("10.0.0.1", 1)])]
        async with running(address) as lists:
            await until(lambda: len(lists) == 1 and bool(fake.services))
            fake.broken = True
            await until(lambda: "does not answer" in caplog.text)
            fake.broken, asked = False, len(fake.queries)
            await until(lambda: "answers again" in caplog.text and len(fake.queries) > asked + 1)
            assert len(lists) == 1
    messages = [record.getMessage() for record in caplog.records]
    assert sum("does not answer" in message for message in messages) == 1
    assert sum("answers again" in message for message in messages) == 1


@pytest.mark.parametrize("nonsense", ["null", "7", "[7]", '"x"', "<html>", "", '[{"Service": null}]'])
async def test_an_answer_that_is_nonsense_costs_nothing_but_time(
    nonsense: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with fake_consul() as (fake, address):
        fake.answers = [(1, [entry("10.0.0.1", 1)])]
        async with running(address) as lists:
            await until(lambda: len(lists) == 1 and bool(fake.services))
            fake.nonsense = nonsense
            await until(lambda: "does not answer" in caplog.text and len(fake.misled) == 2)
            fake.nonsense, fake.services = None, {}
            fake.answers = [(2, [entry("10.0.0.2", 1)])]
            await until(lambda: bool(fake.services) and bool(lists[-1]) and "10.0.0.2" in lists[-1][0].url)


async def test_a_consul_that_is_not_there_is_reported_once_and_nothing_is_handed_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket() as taken:  # bound but not listening: refuses every connection
        taken.bind(("127.0.0.1", 0))
        registry = ConsulRegistry(f"http://127.0.0.1:{taken.getsockname()[1]}", ROUTER, timing=FAST)
        failures: list[str] = []
        original = registry._failed

        def failed(part: str, error: Exception) -> None:
            failures.append(part)
            original(part, error)

        registry._failed = failed  # type: ignore[method-assign]
        lists: list[list[NodeAddress]] = []
        task = asyncio.create_task(registry.run(lists.append, lambda _: pytest.fail("nothing can be known")))
        await until(lambda: all(failures.count(part) >= 3 for part in ("nodes", "routers", "registration")))
        await registry.close()
        await task
    assert lists == []
    assert sum("does not answer" in record.getMessage() for record in caplog.records) == 1
    assert "could not deregister" in caplog.text


async def test_a_cancelled_run_still_deregisters_on_close() -> None:
    async with fake_consul() as (fake, address):
        registry = ConsulRegistry(address, ROUTER, timing=FAST)
        task = asyncio.create_task(registry.run(lambda _: None, lambda _: None))
        await until(lambda: bool(fake.services))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await registry.close()
        assert fake.services == {}


async def test_closed_before_it_ever_ran_it_does_not_run() -> None:
    registry = ConsulRegistry("http://127.0.0.1:1", ROUTER, timing=FAST)
    await registry.close()
    await registry.run(*[lambda _: pytest.fail("nothing can be known")] * 2)


@pytest.mark.parametrize("address", ["https://127.0.0.1:1", "http://[::1]:1", "https://localhost:1"])
async def test_any_form_of_address_is_tried(address: str, caplog: pytest.LogCaptureFixture) -> None:
    async with running(address) as lists:
        await until(lambda: f"Consul at {address} does not answer" in caplog.text)
        assert lists == []
    assert "onnect" in caplog.text, "it is the connection that failed"
