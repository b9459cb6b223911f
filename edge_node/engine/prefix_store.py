"""The prefix store's books: which blocks of prompt are kept, under what key, and which goes next.

A key says all ids from the start of the prompt to the end of its block, so a chain of keys is a path
in a tree, and what is resident is always the top of that tree:

    root(salt) - [ids 0..63] - [64..127] - [128..191]
                                         \\ [128'..191']      another continuation of the same start

Blocks are copied into a slot before use, so nothing is pinned and nothing is counted: any leaf may go
at any time. Does not know arrays, slots or requests: only block numbers and keys.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from edge_node.engine.step import BLOCK_TOKENS

_KEY_BYTES = 16


def block_keys(salt: str, ids: Sequence[int]) -> list[bytes]:
    """The key of each whole block of `ids`: a hash of the block under its parent's key, the root's being `salt`.

    Equal keys mean equal salt and equal ids up to the block's end (blake2b, 128 bits).
    """
    key = blake2b(salt.encode(), digest_size=_KEY_BYTES).digest()
    data = memoryview(array("q", ids)).cast("B")
    block_bytes = BLOCK_TOKENS * 8
    keys: list[bytes] = []
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        key = blake2b(data[start : start + block_bytes], digest_size=_KEY_BYTES, key=key).digest()
        keys.append(key)
    return keys


@dataclass(frozen=True, slots=True)
class _Resident:
    """A block that is kept: its number, and the key before its own, b"" for the first of a chain."""

    block: int
    parent: bytes


class PrefixStore:
    """Invariant: free + used == capacity, and a resident block's parent is resident and more recently used.

    So the least recently used block is always a leaf, and an eviction looks at nothing else. Chains are used from
    their deepest block to their root, which is what keeps it so.
    """

    def __init__(self, capacity: int) -> None:
        """capacity: blocks; 0 = never holds anything."""
        self.generation = 0
        """Changes with every insertion and eviction."""
        self._capacity = capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._residents: OrderedDict[bytes, _Resident] = OrderedDict()

    def __len__(self) -> int:
        """Blocks in use."""
        return len(self._residents)

    def resident(self, keys: Sequence[bytes]) -> int:
        """How many of a chain's first blocks are resident; marks nothing.

        Bisection: a block is never there without its parent.
        """
        known, unknown = 0, len(keys)
        while known < unknown:
            middle = (known + unknown) // 2
            if keys[middle] in self._residents:
                known = middle + 1
            else:
                unknown = middle
        return known

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The numbers of a chain's resident first blocks, which count as used now."""
        run = keys[: self.resident(keys)]
        self._use(run)
        return [self._residents[key].block for key in run]

    def insert(self, keys: Sequence[bytes]) -> tuple[int, list[int]]:
        """Make a chain resident, evicting what was not used for longest, but none of this chain.

        Returns which block was the first that was missing, and the numbers to write it and its followers to: fewer
        than are missing when the store is too small. They count as resident at once, so the caller has them
        written before anything that matches them is loaded.
        """
        first = self.resident(keys)
        room = self._capacity - first
        missing = keys[first : first + room]
        self._use(keys[:first])
        self._evict(len(missing) - len(self._free))
        blocks = [self._free.pop() for _ in missing]
        parent = keys[first - 1] if first else b""
        for key, block in zip(missing, blocks, strict=True):
            self._residents[key] = _Resident(block, parent)
            parent = key
        self._use(keys[: first + len(missing)])
        self.generation += bool(missing)
        return first, blocks

    def _use(self, run: Sequence[bytes]) -> None:
        for key in reversed(run):
            self._residents.move_to_end(key)

    def _evict(self, count: int) -> None:
        for _ in range(count):
            _, gone = self._residents.popitem(last=False)
            self._free.append(gone.block)

    def check_invariants(self) -> None:
        blocks = [resident.block for resident in self._residents.values()]
        assert sorted(blocks + self._free) == list(range(self._capacity)), "every block is free or used, once"
        self._check_order(self._residents.items())

    def _check_order(self, oldest_first: Iterable[tuple[bytes, _Resident]]) -> None:
        passed: set[bytes] = set()
        for key, resident in oldest_first:
            passed.add(key)
            assert resident.parent not in passed, "a block is less recently used than its child"
            assert not resident.parent or resident.parent in self._residents, "a block is there without its parent"
