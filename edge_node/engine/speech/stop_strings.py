"""Stop strings: cut text before the first of them, and show nothing of it.

The result depends on the text alone, not on how it was split into ids. Does not know ids.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Holds back text that may still become a stop string.

    Invariant: `_held` is the longest end of the text so far that begins a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is now certain to be no part of a stop string; sets `found`."""
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            # The one that is complete first; of several that end together, the longest.
            shown, self._held, self.found = self._held[: min(ends)[1]], "", True
            return shown
        keep = max((self._begun(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, once it is certain that no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def _begun(self, stop: str) -> int:
        """Characters of `stop`, less than all, that the text ends with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
