"""Ids, and how many of them a slot holds.

    positions   0 ............ prompt ............ P ...... output ...... P + len(output)
    to read     [.................................R
    in the KV   [------- computed -------)

A sequence is *reading* while computed < R, else *writing*. Whatever its history, its computed tokens
catch up with its tokens: positions to read through the chunk path (or copied from prefix blocks, which
hold the same bits), the others through the one-token path, one by one. What is to be read is the prompt,
R = P; of an answer that is continued in a hurry also the ids that it was given, which are otherwise computed as
they were when they were sampled (docs/decisions/020-one-rule-and-the-ladder.md). Beyond R only drafts go through the
chunk path (docs/decisions/025-speculation.md).
Does not know slots beyond the number it holds, nor other sequences, nor what is said.
"""

from __future__ import annotations

from edge_node.engine.speculation import Speculator
from edge_node.engine.step import BLOCK_TOKENS

# Fewer ids are read sooner than a copy is set up, and a chunk of two may read one of them twice.
MIN_GAIN_TOKENS = 2


class Sequence:
    """Invariant: 0 <= computed < tokens while it is scheduled.

    keys: of the whole blocks of what is to be read. limit_tokens: prompt and output together never get longer.
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
        self.to_read = prompt
        self.keys = keys
        self.limit_tokens = limit_tokens
        self.priority = priority
        self.speculator = speculator
        self.output: list[int] = []
        self.computed = 0
        self.slot: int | None = None
        self.number = 0  # by arrival
        self.admitted_s: float | None = None
        self.cached_tokens = 0  # prompt ids that the first reading did not compute
        self.recovering = False  # lost its slot, and has not got back to where it was
        self._was_read = False

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first has the lowest."""
        return -self.priority, self.number

    @property
    def reading(self) -> bool:
        return self.computed < len(self.to_read)

    @property
    def ends_read(self) -> bool:
        """Whether nothing is known beyond what is to be read, so that its last position is sampled from."""
        return len(self.to_read) == self.tokens

    @property
    def prompt_computed(self) -> int:
        """How many of the prompt's positions are computed."""
        return min(self.computed, len(self.prompt))

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

    def read_output(self, keys: list[bytes]) -> None:
        """Have the output ids so far read like a prompt; only before it is scheduled. keys: as of then."""
        self.to_read = [*self.prompt, *self.output]
        self.keys = keys

    def seat(self, slot: int, now_s: float) -> None:
        """Take a slot, in which nothing is computed yet."""
        self.slot = slot
        if self.admitted_s is None:
            self.admitted_s = now_s

    def unseat(self) -> None:
        """Leave the slot; everything is to be computed again."""
        self.slot = None
        self.computed = 0
        self.recovering = True
        if not self._was_read:
            self.cached_tokens = 0

    def hit(self, blocks: int) -> bool:
        """Take that many blocks by copy, but never the last id to read; False if that is no gain."""
        reached = min(blocks * BLOCK_TOKENS, len(self.to_read) - 1)
        if reached - self.computed < MIN_GAIN_TOKENS:
            return False
        before, self.computed = self.prompt_computed, reached
        if not self._was_read:
            self.cached_tokens += self.prompt_computed - before
        return True

    def read_to(self, position: int) -> None:
        """A chunk has computed what is to be read up to there."""
        self.computed = min(position, len(self.to_read))
        self._was_read = self._was_read or not self.reading
        self._settle()

    def written(self) -> None:
        """One more output position is computed."""
        self.computed += 1
        self._settle()

    def _settle(self) -> None:
        self.recovering = self.recovering and self.computed + 1 < self.tokens

    def check_invariants(self) -> None:
        assert 0 <= self.computed < self.tokens <= self.limit_tokens, (self.computed, self.tokens, self.limit_tokens)
        assert len(self.prompt) <= len(self.to_read) <= self.tokens
        assert len(self.keys) == len(self.to_read) // BLOCK_TOKENS
