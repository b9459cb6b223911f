"""What the engine's prefix store holds, and what of it routers have still to be told.

All links are told the same news, and a new link first what the others know; so one table serves them all.
Does not know links or frames, nor how prefix keys are made.
"""

from __future__ import annotations

from collections.abc import Iterable

MOST_TOLD = 4096
"""Entries of one Status, and keys that an engine lets stand at any time."""


class ResidentTable:
    """Invariant: `_told` is what every link holds that took the first list and all news since."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self._told: dict[str, int] = {}

    def update(self, changes: Iterable[tuple[str, int]]) -> None:
        """(prefix key, resident tokens) that have changed; 0 = gone."""
        for key, tokens in changes:
            if tokens:
                self._tokens[key] = tokens
            else:
                self._tokens.pop(key, None)

    def clear(self) -> None:
        """The engine process has ended, and its prefix store with it."""
        self._tokens.clear()

    def told(self) -> list[tuple[str, int]]:
        """What the links know, for one that has just said Hello."""
        return list(self._told.items())

    def news(self) -> list[tuple[str, int]]:
        """What the links do not know yet, at most MOST_TOLD entries, first those that are gone; counts as told."""
        if self._tokens == self._told:
            return []
        gone = [(key, 0) for key in self._told if key not in self._tokens]
        changed = [entry for entry in self._tokens.items() if self._told.get(entry[0]) != entry[1]]
        news = (gone + changed)[:MOST_TOLD]
        for key, tokens in news:
            if tokens:
                self._told[key] = tokens
            else:
                del self._told[key]
        return news
