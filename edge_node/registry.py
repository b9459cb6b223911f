"""Keep this node registered in Consul; the only module of the node that imports `consul`.

Consul is never needed to serve: it may be down at the start, later, or forever. Does not know how ready the
node is: Consul asks /readyz itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from consul import Check, Consul, ConsulException

from core.errors import ConfigError

log = logging.getLogger("edge_node.registry")

SERVICE_NAME = "edgechat-node"
# How long a restarted Consul can stay without this node.
WATCH_S = 2.0
REQUEST_S = 2.0
DEREGISTER_S = 3.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Service:
    """What others learn about this node; `id` is new with every start. tls: whether /readyz is https."""

    id: str
    address: str
    port: int
    meta: dict[str, str]
    tls: bool

    @property
    def check_url(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}/readyz"


class Registry:
    """Registers, registers again when its id is missing, deregisters.

    The client blocks, so it lives in a thread of its own; having only one keeps the calls in order:
    a registration under way ends before the deregistration begins.
    """

    def __init__(self, url: str, service: Service) -> None:
        """url: of the agent, http or https; CONSUL_HTTP_TOKEN is honoured. Raises ConfigError."""
        self._service = service
        self._url = url
        self._client = _client(url)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="consul")
        self._reachable: bool | None = None

    async def run(self) -> None:
        """Watch for ever; Consul being down is said once per change."""
        while True:
            await self._watch()
            await asyncio.sleep(WATCH_S)

    async def deregister(self) -> None:
        """Leave, within DEREGISTER_S; a Consul that does not answer forgets the node by itself."""
        try:
            async with asyncio.timeout(DEREGISTER_S):
                await self._call(lambda: self._client.agent.service.deregister(self._service.id))
            log.info("consul_deregistered id=%s", self._service.id)
        except (ConsulException, OSError) as error:  # OSError: the client's connection errors and our timeout
            log.warning("consul_deregister_failed id=%s error=%r", self._service.id, str(error))
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        try:
            known = await self._call(lambda: self._client.agent.service_definition(self._service.id))
            if known is None:
                await self._call(self._register)
                log.info("consul_registered id=%s url=%s", self._service.id, self._url)
        except (ConsulException, OSError) as error:
            if self._reachable is not False:
                log.warning("consul_unreachable url=%s error=%r serving=unaffected", self._url, str(error))
            self._reachable = False
        else:
            if self._reachable is False:
                log.info("consul_reachable url=%s", self._url)
            self._reachable = True

    def _register(self) -> None:
        service = self._service
        check = Check.http(service.check_url, interval="2s", timeout="1s", deregister="1m")
        if service.tls:
            # The agent asks for health, it hands over no secret: it need not know our certificate authority.
            check["tls_skip_verify"] = True
        self._client.agent.service.register(
            SERVICE_NAME, service.id, address=service.address, port=service.port, meta=service.meta, check=check
        )

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _client(url: str) -> Any:
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port or 8500
    except ValueError:
        host, port = None, 0
    if not host:
        raise ConfigError(f"discovery.consul is {url!r}; write a URL such as http://127.0.0.1:8500.")
    host = f"[{host}]" if ":" in host else host
    return Consul(host=host, port=port, scheme=parts.scheme, connections_timeout=REQUEST_S)
