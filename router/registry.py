"""Discovery: where the nodes and the other routers are. Consul, or lists from the configuration, behind one interface.

Says where they are, not whether they work: whoever speaks to them finds that out (`router/link.py`, `router/peers.py`).
The only module of the router that speaks to Consul; docs/decisions/051-discovery.md gives the reasons.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeAlias, TypeVar
from urllib.parse import urlsplit

import aiohttp
import consul.aio
import msgspec
from consul import ConsulException

from core.errors import ConfigError
from router.backoff import Backoff
from router.config import is_router_name, named_routers

log = logging.getLogger(__name__)

NODE_SERVICE = "edgechat-node"
ROUTER_SERVICE = "edgechat-router"
LINK_PATH = "/link"

A = TypeVar("A")


class NodeAddress(msgspec.Struct, frozen=True):
    """Where a node takes links: `ws://host:port/link` or `wss://...`.

    name, region: "" where discovery does not know them; the node's Hello does.
    """

    url: str
    name: str
    region: str


class RouterAddress(msgspec.Struct, frozen=True):
    """Where another router takes requests, `http://host:port` or `https://...`, and the name in its responses' ids."""

    name: str
    url: str


OnNodes: TypeAlias = Callable[[list[NodeAddress]], None]
OnRouters: TypeAlias = Callable[[list[RouterAddress]], None]


class Registry(Protocol):
    """Tells where nodes and other routers are, from `run` until `close`."""

    async def run(self, on_nodes: OnNodes, on_routers: OnRouters) -> None:
        """Hand out each whole list at first and at every change; returns after `close`, may be cancelled."""

    async def close(self) -> None:
        """End `run` and take back what was registered."""


class StaticRegistry:
    """Lists that never change: `[discovery] static = ["ws://127.0.0.1:8081"]` and the named ones of `routers`.

    own_name: this router's, which is left out, so that all routers can have the same list.
    Raises ConfigError for a node that is no WebSocket URL; one without a path gets `/link`.
    """

    def __init__(self, urls: Iterable[str], routers: Iterable[str] = (), own_name: str = "") -> None:
        self._nodes = [_static_address(url) for url in dict.fromkeys(urls)]
        self._routers = [RouterAddress(*named) for named in named_routers(routers) if named.name != own_name]
        self._closed = asyncio.Event()

    async def run(self, on_nodes: OnNodes, on_routers: OnRouters) -> None:
        on_nodes(self._nodes)
        on_routers(self._routers)
        await self._closed.wait()

    async def close(self) -> None:
        self._closed.set()


def _static_address(url: str) -> NodeAddress:
    try:
        parts = urlsplit(url)
        if parts.scheme not in {"ws", "wss"} or not parts.hostname or parts.port == 0:
            raise ValueError(url)
    except ValueError as error:
        raise ConfigError(f"discovery.static holds {url!r}; write ws://host:port or wss://host:port.") from error
    path = LINK_PATH if parts.path in {"", "/"} else parts.path
    return NodeAddress(parts._replace(path=path).geturl(), parts.netloc, "")


class RouterService(msgspec.Struct, frozen=True, kw_only=True):
    """This router as others find it. instance: new with every start; host, port: where it can be reached."""

    name: str
    instance: str
    region: str
    host: str
    port: int
    tls: bool = False

    @property
    def id(self) -> str:
        return f"{ROUTER_SERVICE}-{self.name}-{self.instance}"


class ConsulTiming(msgspec.Struct, frozen=True):
    """call_s: for an answer that should come at once. watch_s: how long a blocking query may block.
    rest_s: least time between two queries, whatever Consul does. recheck_s: between looks at our own registration.
    """

    call_s: float = 5.0
    watch_s: int = 30
    rest_s: float = 0.1
    recheck_s: float = 3.0
    backoff_first_s: float = 0.2
    backoff_most_s: float = 5.0


_FAILURES = (aiohttp.ClientError, OSError, ConsulException, msgspec.ValidationError, ValueError)


class ConsulRegistry:
    """Watches the nodes and the routers that pass their check, and keeps this router registered.

    Invariant: while Consul is away the last lists stand and nothing is handed out. Its loss and return
    are logged once each.

    address: `http://host:port` or `https://...` of an agent. Raises ConfigError if it is not.
    """

    def __init__(self, address: str, router: RouterService, *, timing: ConsulTiming | None = None) -> None:
        try:
            parts = urlsplit(address)
            self._host, self._port = parts.hostname or "", parts.port or 8500
        except ValueError:
            self._host = ""
        if not self._host or parts.scheme not in {"http", "https"}:
            raise ConfigError(f"discovery.consul is {address!r}; write a URL such as http://127.0.0.1:8500.")
        self._scheme = parts.scheme
        self._address = address
        self._router = router
        self._timing = timing or ConsulTiming()
        self._tasks: list[asyncio.Task[None]] = []
        self._client: Any = None
        self._closed = False
        self._failing: set[str] = set()

    async def run(self, on_nodes: OnNodes, on_routers: OnRouters) -> None:
        if self._closed:
            return
        # py-consul ships no types, and opens its HTTP session where the loop runs.
        self._client = consul.aio.Consul(
            _in_url(self._host), self._port, scheme=self._scheme, verify=self._scheme == "https"
        )
        async with asyncio.TaskGroup() as group:
            self._tasks = [
                group.create_task(self._watch("nodes", NODE_SERVICE, node_addresses, on_nodes)),
                group.create_task(self._watch("routers", ROUTER_SERVICE, self._other_routers, on_routers)),
                group.create_task(self._stay_registered()),
            ]

    async def close(self) -> None:
        self._closed = True
        if self._client is None:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self._call(self._client.agent.service.deregister(self._router.id))
        except _FAILURES as error:
            log.warning(
                "This router could not deregister from Consul at %s (%s); its check will.", self._address, error
            )
        await self._client.close()
        self._client = None

    async def _call(self, request: Coroutine[Any, Any, Any], extra_s: float = 0.0) -> Any:
        async with asyncio.timeout(self._timing.call_s + extra_s):
            return await request

    def _backoff(self) -> Backoff:
        return Backoff(random.random, first_s=self._timing.backoff_first_s, most_s=self._timing.backoff_most_s)

    # -- what others are there -----------------------------------------------------------------

    async def _watch(
        self, part: str, service: str, read: Callable[[object], list[A]], hand_out: Callable[[list[A]], None]
    ) -> None:
        """Hand out what `read` makes of the passing instances of a service. part: what the log calls them."""
        index, backoff = 0, self._backoff()
        known: list[A] | None = None
        while True:
            try:
                answered, entries = await self._query(service, index)
                found = read(entries)
            except _FAILURES as error:
                self._failed(part, error)
                index = 0
                await asyncio.sleep(backoff.next_delay_s())
                continue
            index = next_index(index, answered)
            backoff = self._backoff()
            self._worked(part)
            if found != known:
                known = found
                hand_out(found)
            await asyncio.sleep(self._timing.rest_s)

    async def _query(self, service: str, index: int) -> tuple[int, object]:
        """One blocking query: returns when something changed after `index`, or after `watch_s`."""
        wait_s = self._timing.watch_s
        request = self._client.health.service(service, index=index or None, wait=f"{wait_s}s", passing=True)
        # Consul lets up to a sixteenth more pass, so that its clients do not come back in step.
        answered, entries = await self._call(request, extra_s=wait_s * 17 / 16)
        return int(answered), entries

    def _other_routers(self, entries: object) -> list[RouterAddress]:
        return [router for router in router_addresses(entries) if router.name != self._router.name]

    # -- this router ---------------------------------------------------------------------------

    async def _stay_registered(self) -> None:
        """An agent that restarted may have forgotten us; a check may have thrown us out."""
        backoff = self._backoff()
        while True:
            try:
                services = await self._call(self._client.agent.services())
                if self._router.id not in msgspec.convert(services, dict[str, Any]):
                    await self._register()
            except _FAILURES as error:
                self._failed("registration", error)
                await asyncio.sleep(backoff.next_delay_s())
                continue
            backoff = self._backoff()
            self._worked("registration")
            await asyncio.sleep(self._timing.recheck_s)

    async def _register(self) -> None:
        router = self._router
        scheme = "https" if router.tls else "http"
        check = {
            # Alive, not ready: a router without nodes is still a router, and owns its responses.
            "http": f"{scheme}://{_in_url(router.host)}:{router.port}/livez",
            "interval": "5s",
            "timeout": "2s",
            "tls_skip_verify": True,  # the certificate names the public host, the agent asks by address
            "DeregisterCriticalServiceAfter": "1m",
        }
        request = self._client.agent.service.register(
            ROUTER_SERVICE,
            service_id=router.id,
            address=router.host,
            port=router.port,
            check=check,
            meta={"name": router.name, "instance": router.instance, "region": router.region, "scheme": scheme},
        )
        await self._call(request)
        log.info("This router is registered in Consul at %s as %s.", self._address, router.id)

    # -- what the log says ---------------------------------------------------------------------

    def _failed(self, part: str, error: Exception) -> None:
        if not self._failing:
            why = str(error) or type(error).__name__
            log.warning("Consul at %s does not answer (%s); the last known nodes and routers stay.", self._address, why)
        self._failing.add(part)

    def _worked(self, part: str) -> None:
        if part in self._failing:
            self._failing.remove(part)
            if not self._failing:
                log.info("Consul at %s answers again.", self._address)


# -- Consul's answers, as they are documented for GET /v1/health/service/:service ----------------


class _Node(msgspec.Struct, frozen=True, rename="pascal"):
    address: str


class _Service(msgspec.Struct, frozen=True, rename="pascal"):
    address: str
    port: int
    meta: dict[str, str] | None = None
    create_index: int = 0


class _Entry(msgspec.Struct, frozen=True, rename="pascal"):
    node: _Node
    service: _Service


def next_index(before: int, answered: int) -> int:
    """The index to ask with next. One that went backwards (a restarted or restored Consul) starts over from 0."""
    return 0 if answered < before else max(answered, 1)


def node_addresses(entries: object) -> list[NodeAddress]:
    """Addresses out of a health query's answer, in a stable order; raises msgspec.ValidationError.

    A service without an address of its own has its agent's. meta: name, region, scheme ("ws" or "wss").
    """
    found: dict[str, NodeAddress] = {}
    for entry in msgspec.convert(entries or [], list[_Entry]):
        meta = entry.service.meta or {}
        scheme = "wss" if meta.get("scheme") in {"wss", "https"} else "ws"
        url = f"{scheme}://{_host_and_port(entry)}{LINK_PATH}"
        found[url] = NodeAddress(url, meta.get("name", ""), meta.get("region", ""))
    return [found[url] for url in sorted(found)]


def router_addresses(entries: object) -> list[RouterAddress]:
    """As `node_addresses`, by name. meta: name, scheme ("http" or "https"); one without a proper name owns no response.

    Where two instances have one name, the router was started anew: the one that registered last counts.
    """
    found: dict[str, RouterAddress] = {}
    for entry in sorted(msgspec.convert(entries or [], list[_Entry]), key=lambda entry: entry.service.create_index):
        meta = entry.service.meta or {}
        name, scheme = meta.get("name", ""), "https" if meta.get("scheme") == "https" else "http"
        if is_router_name(name):
            found[name] = RouterAddress(name, f"{scheme}://{_host_and_port(entry)}")
    return [found[name] for name in sorted(found)]


def _host_and_port(entry: _Entry) -> str:
    return f"{_in_url(entry.service.address or entry.node.address)}:{entry.service.port}"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
