"""Keeps what this router answers: writes its journal to the store, renews its lease, goes on with what others left.

The store's only caller that writes. Does not know clients nor nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import NamedTuple

from core.errors import StoreUnavailable
from router.errors import Draining
from router.journal import HEARTBEAT_S, Entry, Journal, Outcome, Store, Unfinished

log = logging.getLogger(__name__)

DRAIN_S = 5.0
"""How long a router that stops waits for its journal to be written."""


CLAIMS_PER_BEAT = 8
"""Large conversations take long to claim, and a lease must not end over it."""
MAX_PAUSE_LOOKS = 32
MAX_TRIES_KNOWN = 4096


class _Tried(NamedTuple):
    """In looks: how long the last pause was, and when the next try may be."""

    pause: int
    again_at: int


class Keeper:
    """Invariant: one batch of the journal is being written at a time.

    on_refused: is called for each batch that the store did not take whole.
    """

    def __init__(self, store: Store, on_refused: Callable[[], None]) -> None:
        self.journal = Journal(self._commit)
        self._store = store
        self._on_refused = on_refused
        self._writing: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._failing = False
        self._looks = 0
        self._tries: dict[str, _Tried] = {}

    # -- the journal ---------------------------------------------------------------------------

    def _commit(self, batch: list[Entry]) -> None:
        self._idle.clear()
        self._writing = asyncio.get_running_loop().create_task(self._write(batch), name="journal")

    async def _write(self, batch: list[Entry]) -> None:
        outcomes: list[Outcome] | None = None
        try:
            outcomes = await self._store.write(batch)
            if "refused" in outcomes:
                self._on_refused()
            self._worked()
        except StoreUnavailable as error:
            self._failed(error)
        except Exception:
            # Whatever keeps the store from writing, its readers must hear of it and not wait for ever.
            log.exception("the store failed to write %d entries", len(batch))
            self._on_refused()
        self._idle.set()
        if outcomes is None:
            self.journal.failed()
        else:
            self.journal.committed(outcomes)

    async def drain(self) -> None:
        """Wait until all that was put is written, for at most DRAIN_S."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while len(self.journal):
                    await self._idle.wait()
                    await asyncio.sleep(0)

    # -- the lease -----------------------------------------------------------------------------

    async def keep(self, held: Callable[[str], bool], adopt: Callable[[Unfinished], object]) -> None:
        """For ever: say that this router lives, and go on with what nobody holds any more.

        held: whether a response is in this router's table. adopt: put it there.
        """
        while True:
            try:
                await self.look_once(held, adopt)
            except Exception:
                # Whatever it was: without its lease this router would lose everything that it is answering.
                log.exception("the router's lease was not looked after")
            await asyncio.sleep(HEARTBEAT_S)

    async def look_once(self, held: Callable[[str], bool], adopt: Callable[[Unfinished], object]) -> None:
        """One beat, and one look for responses without an owner."""
        self._looks += 1
        try:
            await self._store.beat()
            for number, (tenant, response_id) in enumerate(await self._store.unclaimed(), 1):
                if not held(response_id) and self._may_try(response_id):
                    await self._take(tenant, response_id, held, adopt)
                if number % CLAIMS_PER_BEAT == 0:
                    await self._store.beat()
            self._worked()
        except StoreUnavailable as error:
            self._failed(error)

    async def _take(
        self, tenant: str, response_id: str, held: Callable[[str], bool], adopt: Callable[[Unfinished], object]
    ) -> None:
        claimed = await self._store.claim(tenant, response_id)
        # Somebody who asked for it may have been quicker.
        if isinstance(claimed, Unfinished) and not held(response_id):
            try:
                adopt(claimed)
            except Draining:
                log.info("the response %s is left to who comes after this router", response_id)
            except Exception:
                log.exception("the response %s cannot be gone on with", response_id)

    def _may_try(self, response_id: str) -> bool:
        """One that comes back again and again is left alone for longer and longer: it costs nodes their time."""
        if len(self._tries) > MAX_TRIES_KNOWN:
            self._tries = {known: tried for known, tried in self._tries.items() if tried.again_at > self._looks}
        tried = self._tries.get(response_id, _Tried(0, 0))
        if tried.again_at > self._looks:
            return False
        long_ago = self._looks - tried.again_at > MAX_PAUSE_LOOKS
        pause = 1 if long_ago or not tried.pause else min(MAX_PAUSE_LOOKS, 2 * tried.pause)
        self._tries[response_id] = _Tried(pause, self._looks + pause)
        return True

    def _failed(self, error: StoreUnavailable) -> None:
        self._on_refused()
        if not self._failing:
            log.error("%s Stored responses stop until it works again.", error.message)
        self._failing = True

    def _worked(self) -> None:
        if self._failing:
            log.info("the store works again")
        self._failing = False
