"""Slots of the KV pool: which are free, and who holds the others.

Answers take the lowest free slot, so that they lie close together: a decode batch spans every slot
between its first and last row. What may be dropped at any time takes the highest, out of their way.
Does not know what a slot contains.
"""

from __future__ import annotations

from bisect import insort


class Slots:
    """Invariant: free + used == capacity, and no slot is both."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = list(range(capacity))  # ascending
        self._used: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._used)

    @property
    def lowest_free(self) -> int | None:
        return self._free[0] if self._free else None

    def allocate(self, highest: bool = False) -> int | None:
        """The lowest (or highest) free slot, None if there is none."""
        if not self._free:
            return None
        slot = self._free.pop(-1 if highest else 0)
        self._used.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back; raises KeyError if it was not in use."""
        self._used.remove(slot)
        insort(self._free, slot)

    def check_invariants(self) -> None:
        assert self.free + self.used == self.capacity, (self._free, self._used)
        assert self._free == sorted(self._free)
        assert self._used.isdisjoint(self._free), (self._free, self._used)
        assert self._used.union(self._free) == set(range(self.capacity)), (self._free, self._used)
