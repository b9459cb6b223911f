"""Ids, and how many of them a slot holds.

    positions   0 ............ prompt ............ P ...... output ...... P + len(output)
    in the KV   [------- computed -------)

A sequence is *reading* while computed < P, else *writing*. Whatever its history, its computed tokens
catch up with its tokens: prompt positions through the chunk path (or copied from prefix blocks, which
hold the same bits), output positions through the one-token path, ids that were given like ids that
were sampled. Only drafts go through the chunk path beyond the prompt (docs/decisions/025-speculation.md).
Does not know slots beyond the number it holds, nor other sequences, nor what is said.
"""

from __future__ import annotations

from edge_node.engine.speculation import Speculator
from edge_node.engine.step import BLOCK_TOKENS


class Sequence:
    """Invariant: 0 <= computed < tokens while it is scheduled.

    keys: of the prompt's whole blocks. limit_tokens: prompt and output together never get longer.
    priority: higher goes first. speculator: drafts what may follow, None where that is not wanted.
    """

    def __init__(
        self,
        prompt: list[int],
        keys: list[bytes],
        limit_tokens: int,
        priority: int = 0,
        speculator: Speculator | None = None,
    ) -> None:
        self.prompt = prompt
        self.keys = keys
        self.limit_tokens = limit_tokens
        self.priority = priority
        self.speculator = speculator
        self.output: list[int] = []
        self.computed = 0
        self.slot: int | None = None
        self.number = 0  # by arrival
        self.admitted_s: float | None = None
        self.cached_tokens = 0  # of the first admission

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first has the lowest."""
        return -self.priority, self.number

    @property
    def reading(self) -> bool:
        return self.computed < len(self.prompt)

    @property
    def wants_sample(self) -> bool:
        """Whether the next position to compute is the last one known."""
        return self.computed + 1 == self.tokens

    @property
    def next_id(self) -> int:
        """The output id whose position is computed next; only while writing."""
        return self.output[self.computed - len(self.prompt)]

    def append(self, token: int) -> None:
        self.output.append(token)
        if self.speculator is not None:
            self.speculator.push(token)

    def seat(self, slot: int, cached_blocks: int, now_s: float) -> None:
        """Take a slot into which that many blocks of the prompt will be copied; the last id is always read anew."""
        self.slot = slot
        self.computed = min(cached_blocks * BLOCK_TOKENS, len(self.prompt) - 1)
        if self.admitted_s is None:
            self.admitted_s, self.cached_tokens = now_s, self.computed

    def unseat(self) -> None:
        """Leave the slot; everything is to be computed again."""
        self.slot = None
        self.computed = 0

    def check_invariants(self) -> None:
        assert 0 <= self.computed < self.tokens <= self.limit_tokens, (self.computed, self.tokens, self.limit_tokens)
        assert len(self.keys) == len(self.prompt) // BLOCK_TOKENS
