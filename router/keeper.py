"""Keeps what this router answers: writes its journal to the store, renews its lease, goes on with what others left.

The store's only caller that writes. Does not know clients nor nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from core.errors import StoreUnavailable
from router.journal import HEARTBEAT_S, Entry, Journal, Outcome, Owned, Store, Unfinished

log = logging.getLogger(__name__)

DRAIN_S = 5.0
"""How long a router that stops waits for its journal to be written."""


class Keeper:
    """Invariant: one batch of the journal is being written at a time.

    on_refused: is called for each batch that the store did not take.
    """

    def __init__(self, store: Store, on_refused: Callable[[], None]) -> None:
        self.journal = Journal(self._commit)
        self._store = store
        self._on_refused = on_refused
        self._writing: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._failing = False

    # -- the journal ---------------------------------------------------------------------------

    def _commit(self, batch: list[Entry]) -> None:
        self._idle.clear()
        self._writing = asyncio.get_running_loop().create_task(self._write(batch), name="journal")

    async def _write(self, batch: list[Entry]) -> None:
        try:
            outcomes: list[Outcome] = await self._store.write(batch)
        except StoreUnavailable as error:
            self._failed(error)
            outcomes = ["refused"] * len(batch)
        except Exception:
            # Whatever keeps the store from writing, its readers must hear of it and not wait for ever.
            log.exception("the store failed to write %d entries", len(batch))
            self._on_refused()
            outcomes = ["refused"] * len(batch)
        else:
            self._worked()
        self._idle.set()
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
            await self.look_once(held, adopt)
            await asyncio.sleep(HEARTBEAT_S)

    async def look_once(self, held: Callable[[str], bool], adopt: Callable[[Unfinished], object]) -> None:
        """One beat, and one look for responses without an owner."""
        try:
            await self._store.beat()
            for tenant, response_id in await self._store.unclaimed():
                if held(response_id):
                    continue
                claimed = await self._store.claim(tenant, response_id)
                if claimed is None or isinstance(claimed, Owned):
                    continue
                # Somebody who asked for it may have been quicker.
                if not held(response_id):
                    adopt(claimed)
            self._worked()
        except StoreUnavailable as error:
            self._failed(error)

    def _failed(self, error: StoreUnavailable) -> None:
        self._on_refused()
        if not self._failing:
            log.error("%s Stored responses stop until it works again.", error.message)
        self._failing = True

    def _worked(self) -> None:
        if self._failing:
            log.info("the store works again")
        self._failing = False
