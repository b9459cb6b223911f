"""When to try again: exponential backoff with full jitter and a minimum life before it resets.

Does not sleep, and takes its randomness from outside. Shared by the links to nodes and by discovery.
"""

from __future__ import annotations

from collections.abc import Callable


class Backoff:
    """Delays drawn evenly from [0, min(most_s, first_s * 2 ** failures)], so that many routers that lost
    the same node do not come back in step.

    A connection that lived shorter than `min_life_s` counts as a failure however well it began: a peer
    that accepts and hangs up is not tried in a tight loop.

    random: gives a number in [0, 1).
    """

    def __init__(
        self, random: Callable[[], float], *, first_s: float = 0.1, most_s: float = 5.0, min_life_s: float = 5.0
    ) -> None:
        self._random = random
        self._first_s = first_s
        self._most_s = most_s
        self._min_life_s = min_life_s
        self._ceiling_s = first_s

    def next_delay_s(self, lived_s: float = 0.0) -> float:
        """How long to wait now that a connection, which was up for `lived_s`, is gone (0 = never was up)."""
        if lived_s >= self._min_life_s:
            self._ceiling_s = self._first_s
        delay_s = self._random() * self._ceiling_s
        self._ceiling_s = min(self._most_s, 2 * self._ceiling_s)
        return delay_s
