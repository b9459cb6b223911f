"""Where a response is: one place to ask, whatever is to be done with it.

    the table of running ones -> the store, finished -> the store, to be claimed -> the router that its id names

Another tenant's response is as unknown as one that never was, on every step. Does not know how another router is asked
(`router/peers.py`), nor what is done with what was found.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeAlias, TypeVar

from core.errors import ResponseNotFound
from router.errors import Draining, ResponseMoved, RouterUnreachable
from router.journal import Owned, StoredResponse
from router.peers import Peers
from router.sessions import Running, Sessions
from router.shelf import Shelf

_ID = re.compile(r"resp_([a-z0-9-]+)_[0-9a-z]+")
_TRIES = 3
ASK_AGAIN_S = 0.25
T = TypeVar("T")


class Elsewhere(NamedTuple):
    """Another router has it, or would know."""

    router: str


Found: TypeAlias = Running | StoredResponse | Elsewhere
Here: TypeAlias = Running | StoredResponse


class Finder:
    """Invariant: a response is claimed and adopted once, however many ask for it at the same time.

    What runs unstored is never found: it belongs to the connection that asked for it.
    """

    def __init__(self, name: str, sessions: Sessions, shelf: Shelf, peers: Peers, *, patience_s: float = 0.0) -> None:
        """name: of this router. patience_s: for one that cannot be reached."""
        self._patience_s = patience_s
        self._name = name
        self._sessions = sessions
        self._shelf = shelf
        self._peers = peers
        self._looking: dict[tuple[str, str], asyncio.Task[Here | Owned | None]] = {}

    async def find(self, tenant: str, response_id: str) -> Found:
        """Raises ResponseNotFound, RouterUnreachable, StoreUnavailable, Draining.

        What runs is not over yet when this returns: whoever joins it before waiting for anything else joins in time.
        """
        here = await self._here(tenant, response_id)
        if isinstance(here, Owned):
            # It may be this router's earlier life, whose lease is not over yet.
            if here.router == self._name or not self._peers.knows(here.router):
                raise RouterUnreachable(here.router)
            return Elsewhere(here.router)
        if here is not None:
            return here
        router = self._named(response_id)
        if router is None:
            raise ResponseNotFound(response_id)
        return Elsewhere(router)

    async def find_here(self, tenant: str, response_id: str) -> Here:
        """The same for another router's question, which is not passed on to a third."""
        here = await self._here(tenant, response_id)
        if here is None:
            raise ResponseNotFound(response_id)
        if isinstance(here, Owned):
            raise RouterUnreachable(here.router)
        return here

    async def patiently(self, read: Callable[[], Awaitable[T]]) -> T:
        """`read`, again and again while the router that has the response cannot be reached, as long as patience lasts.

        Whoever comes back after a router's death would be told to come back again otherwise. Raises what `read` does.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._patience_s
        while True:
            try:
                return await read()
            except RouterUnreachable:
                if loop.time() >= until_s:
                    raise
            await asyncio.sleep(ASK_AGAIN_S)

    async def record(self, tenant: str, response_id: str) -> StoredResponse | None:
        """A finished response, for `previous_response_id`; one that still runs is none, and is left alone.

        Raises RouterUnreachable, StoreUnavailable.
        """
        stored = await self._shelf.get(tenant, response_id)
        if stored is not None or self._sessions.find(tenant, response_id) is not None:
            return stored
        router = self._named(response_id)
        return None if router is None else await self._peers.record(router, tenant, response_id)

    def _named(self, response_id: str) -> str | None:
        """The other router that made this id, if it can be asked."""
        named = _ID.fullmatch(response_id)
        router = named[1] if named else self._name
        return router if router != self._name and self._peers.knows(router) else None

    async def _here(self, tenant: str, response_id: str) -> Here | Owned | None:
        for _ in range(_TRIES):
            if running := self._sessions.find(tenant, response_id):
                return running if running.record.request.store else None
            found = await asyncio.shield(self._look_once(tenant, response_id))
            if not (isinstance(found, Running) and found.over.is_set()):
                return found
        raise ResponseMoved

    def _look_once(self, tenant: str, response_id: str) -> asyncio.Task[Here | Owned | None]:
        """All who ask at a time share one look, which goes on when they have left: what is claimed is adopted."""
        key = tenant, response_id
        looking = self._looking.get(key)
        if looking is None:
            looking = self._looking[key] = asyncio.create_task(self._look(tenant, response_id), name="look")
            looking.add_done_callback(lambda look: self._looked(key, look))
        return looking

    def _looked(self, key: tuple[str, str], look: asyncio.Task[Here | Owned | None]) -> None:
        del self._looking[key]
        if not look.cancelled():
            look.exception()  # whoever still waits is told; if nobody does, nobody need be

    async def _look(self, tenant: str, response_id: str) -> Here | Owned | None:
        stored = await self._shelf.get(tenant, response_id)
        if stored is not None:
            return stored
        if self._sessions.suspended:
            raise Draining
        claimed = await self._shelf.claim(tenant, response_id)
        if running := self._sessions.find(tenant, response_id):
            return running  # the keeper, which looks for what nobody holds, was quicker
        if claimed is None:
            # It may have ended between the two questions.
            return await self._shelf.get(tenant, response_id)
        return claimed if isinstance(claimed, Owned) else self._sessions.adopt(claimed)
