"""Which responses a router has begun or claimed, by its own knowledge: what fences its entries.

A database knows what is there. What it cannot tell is a response that never was from one that was deleted
while this router went on with it: both are absent. Does not know what entries say.
"""

from __future__ import annotations

from router.journal import Began, Dropped, Ended, Entry, Outcome

MAX_HELD = 200_000
"""More than a router can be answering: the rest are responses that others have claimed without its noticing."""
MAX_LOST = 4096
"""Lost responses that are remembered: each only until what its session had put down before it knew is through."""


class Held:
    """Epochs by response id. Bounded: what is running, and the latest that were lost."""

    def __init__(self) -> None:
        self._epochs: dict[str, int] = {}
        self._lost: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._epochs) + len(self._lost)

    def take(self, response_id: str, epoch: int) -> None:
        """A claim was answered: it is this router's, from `epoch` on, unless a later claim was answered before."""
        self._hold(response_id, max(epoch, self._epochs.get(response_id, epoch)))

    def _hold(self, response_id: str, epoch: int) -> None:
        self._lost.pop(response_id, None)
        self._epochs.pop(response_id, None)
        self._epochs[response_id] = epoch
        if len(self._epochs) > MAX_HELD:
            self._lose(next(iter(self._epochs)))

    def epoch(self, response_id: str) -> int | None:
        """Where this router's epochs of it begin; None if it does not hold it (any more)."""
        return self._epochs.get(response_id)

    def was_taken(self, response_id: str) -> bool:
        """Whether the response must be in the store if it is this router's: it has been, and did not end."""
        return response_id in self._epochs or response_id in self._lost

    def settle(self, entry: Entry, outcome: Outcome) -> None:
        """An entry's outcome is known."""
        if isinstance(entry, Began):
            if outcome == "kept":
                self._hold(entry.id, entry.begun.epoch)
        elif outcome == "lost":
            self._lose(entry.id)
        elif outcome == "kept" and isinstance(entry, Ended | Dropped):
            self._epochs.pop(entry.id, None)
            self._lost.pop(entry.id, None)

    def _lose(self, response_id: str) -> None:
        self._epochs.pop(response_id, None)
        self._lost.pop(response_id, None)
        self._lost[response_id] = None
        if len(self._lost) > MAX_LOST:
            del self._lost[next(iter(self._lost))]
