"""The store as clients may see it: its own errors name a file or a host of ours, and are for the log only."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import TypeVar

from core.errors import StoreUnavailable
from router.journal import Owned, Store, StoredResponse, Unfinished, store_failure

log = logging.getLogger(__name__)
T = TypeVar("T")


class Shelf:
    """Every method is the store's, and raises StoreUnavailable with a sentence fit for clients."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        return await self._careful(self._store.get(tenant, response_id))

    async def delete(self, tenant: str, response_id: str) -> bool:
        return await self._careful(self._store.delete(tenant, response_id))

    async def claim(self, tenant: str, response_id: str) -> Unfinished | Owned | None:
        return await self._careful(self._store.claim(tenant, response_id))

    async def _careful(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except StoreUnavailable as error:
            log.error("%s", error.message)
            raise store_failure() from error
