"""Which conversations' beginnings are in the prefix store, under the keys by which routers know them.

A router cannot hash token ids, it has none; it keys items. The engine sees both and notes here where
each item ended. What is told are hints: wrong or late ones cost time, never an answer.
Does not know how keys are made, nor who is told.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from edge_node.engine.prefix_store import PrefixStore
from edge_node.engine.step import BLOCK_TOKENS


class _Beginning(NamedTuple):
    """The first `length` blocks of `chain`, which all keys of one note share."""

    chain: tuple[bytes, ...]
    length: int


class Chains:
    """Invariant: at most `most` keys are known, and `_told` holds what the listener believes, without zeros."""

    def __init__(self, store: PrefixStore, most: int = 4096) -> None:
        self._store = store
        self._most = most
        self._beginnings: OrderedDict[str, _Beginning] = OrderedDict()
        self._told: dict[str, int] = {}
        self._noted = False
        self._generation = store.generation

    def __len__(self) -> int:
        return len(self._beginnings)

    def note(self, keys: Sequence[str], ends: Sequence[int], blocks: Sequence[bytes]) -> None:
        """Remember that keys[i] stands for the first ends[i] ids, whose whole blocks are blocks[:ends[i] // 64].

        A key noted again is replaced; those noted longest ago are forgotten, of one note the shorter first. Surplus
        keys or ends, and blocks that `blocks` does not have, are ignored.
        """
        chain = tuple(blocks)
        for key, end in zip(keys, ends, strict=False):
            self._beginnings[key] = _Beginning(chain, min(end // BLOCK_TOKENS, len(chain)))
            self._beginnings.move_to_end(key)
        while len(self._beginnings) > self._most:
            self._beginnings.popitem(last=False)
        self._noted = True

    def changes(self) -> list[tuple[str, int]]:
        """(key, resident tokens in whole blocks) that differ from what was told last, first those that are gone: 0.

        Looks at nothing when neither the store nor the notes have changed.
        """
        if not self._noted and self._generation == self._store.generation:
            return []
        now = self._resident_tokens()
        gone = [(key, 0) for key in self._told if key not in now]
        changed = [(key, tokens) for key, tokens in now.items() if self._told.get(key) != tokens]
        self._told = now
        self._noted = False
        self._generation = self._store.generation
        return gone + changed

    def _resident_tokens(self) -> dict[str, int]:
        """By key, without zeros. One look at the store per chain, not per key."""
        runs: dict[int, int] = {}
        tokens: dict[str, int] = {}
        for key, (chain, length) in self._beginnings.items():
            run = runs.get(id(chain))
            if run is None:
                run = runs[id(chain)] = self._store.resident(chain)
            if blocks := min(run, length):
                tokens[key] = blocks * BLOCK_TOKENS
        return tokens
