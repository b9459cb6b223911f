"""Slots of the KV pool: which are free, and who holds the others.

The lowest free slot goes first, so that running sequences lie close together: a decode batch spans
every slot between its first and last row. Does not know what a slot contains.
"""

from __future__ import annotations

import heapq


class Slots:
    """Invariant: free + used == capacity, and no slot is both."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = list(range(capacity))  # a heap; sorted ascending it is one
        self._used: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._used)

    def allocate(self) -> int | None:
        """The lowest free slot, None if there is none."""
        if not self._free:
            return None
        slot = heapq.heappop(self._free)
        self._used.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back; raises KeyError if it was not in use."""
        self._used.remove(slot)
        heapq.heappush(self._free, slot)

    def check_invariants(self) -> None:
        assert self.free + self.used == self.capacity, (self._free, self._used)
        assert self._used.isdisjoint(self._free), (self._free, self._used)
        assert self._used.union(self._free) == set(range(self.capacity)), (self._free, self._used)
