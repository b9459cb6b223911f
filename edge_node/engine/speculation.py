"""Guesses of what a response says next, copied from where the same words occurred before (prompt lookup).

    ids    ... a b c X Y Z ......... a b c ?        the last ids occurred earlier: X, then Y, then Z
                     ^head                          may come next; each id that comes proves the head
                                                    right (it moves on) or wrong (a new place is sought)

Whether guesses are worth a run of the model is learnt from the ids that come anyway, before the first
one is drafted: a head that nobody drafts from is followed all the same. Hence text that repeats nothing
costs two look-ups a token and never a run.
Does not know the model, sequences or how a draft is verified (docs/decisions/025-speculation.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeAlias

Gram: TypeAlias = tuple[int, ...]

GRAMS = (3, 2)
"""Lengths of the runs of ids that are looked up, the most telling first."""

LEAST_GAIN = 1.1
"""Tokens a second with a draft over those without one, below which nothing is drafted."""

# Heads that were right for so many ids are one class: text that is being copied.
_LONGEST_RUN = 8
# What lies further back is not looked up: the index of a prompt is made before its first id is answered.
_LOOK_BACK = 8192
# Of one outcome in the running average of its class, once that many were seen.
_LEAST_WEIGHT = 1 / 16


class _Odds:
    """How often a head that was right for `run` ids is right about the next one; unknown = never.

    A short run may be chance, so each of its classes begins with one failure; a long one decides at once.
    """

    def __init__(self) -> None:
        self._share = [0.0] * (_LONGEST_RUN + 1)
        self._seen = [1] * _LONGEST_RUN + [0]

    def observe(self, run: int, right: bool) -> None:
        at = min(run, _LONGEST_RUN)
        self._seen[at] += 1
        self._share[at] += max(1 / self._seen[at], _LEAST_WEIGHT) * (right - self._share[at])

    def accepted(self, run: int, most: int) -> list[float]:
        """How many ids of a draft will be right, on average: item k for a draft of k ids, up to `most`."""
        expected, all_right = [0.0], 1.0
        for after in range(run, run + most):
            all_right *= self._share[min(after, _LONGEST_RUN)]
            expected.append(expected[-1] + all_right)
        return expected


class Speculator:
    """Follows one sequence. Invariant: the last `run` ids before the head are the last `run` ids of all."""

    def __init__(self, ids: Sequence[int]) -> None:
        """ids: the prompt. What repeats within it says nothing about the model, so it is not learnt from."""
        self._ids = list(ids[-_LOOK_BACK:])
        self._odds = _Odds()
        self._head: int | None = None
        self._run = 0
        # After which position each run of ids occurred last, itself counted.
        self._after: dict[int, dict[Gram, int]] = {}
        for n in GRAMS:
            grams = zip(*(islice(self._ids, skip, None) for skip in range(n)), strict=False)
            # Not yet the last one: what it finds must be an earlier place.
            self._after[n] = dict(zip(grams, range(n, len(self._ids)), strict=False))
        self._seek()

    def push(self, token: int) -> None:
        """Take the id that came next, however it came."""
        right = self._head is not None and self._ids[self._head] == token
        if self._head is not None:
            self._odds.observe(self._run, right)
        self._ids.append(token)
        if self._head is not None and right:
            self._head += 1
            self._run += 1
            self._note()
        else:
            self._seek()

    def draft(self, lengths: Sequence[int], plain_s: float, verify_s: Callable[[int], float]) -> list[int]:
        """The ids to try next, [] when trying is not worth it. Changes nothing: pushes judge it.

        lengths: of the chunks that may be run, each the last known id and a draft. plain_s: seconds of a step
        that computes one id, verify_s(length): of such a chunk.
        """
        if self._head is None or not lengths:
            return []
        accepted = self._odds.accepted(self._run, max(lengths) - 1)
        # No chunk is cheaper than one id; a measurement that says so is noise, and no reason to draft.
        gains = {length: (1 + accepted[length - 1]) * plain_s / max(plain_s, verify_s(length)) for length in lengths}
        best = max(gains, key=lambda length: gains[length])
        return self.guess(best - 1) if gains[best] > LEAST_GAIN else []

    def guess(self, count: int) -> list[int]:
        """What comes next if the text goes on as it did before, worth trying or not; [] for text that is new."""
        if self._head is None:
            return []
        copied: list[int] = []
        for at in range(self._head, self._head + count):
            # Past the end, copying reads what it has just written.
            copied.append(self._ids[at] if at < len(self._ids) else copied[at - len(self._ids)])
        return copied

    def check_invariants(self) -> None:
        if self._head is None:
            assert self._run == 0
            return
        assert min(GRAMS) <= self._run <= self._head < len(self._ids)
        known = min(self._run, _LONGEST_RUN)
        assert self._ids[self._head - known : self._head] == self._ids[-known:]

    def _seek(self) -> None:
        """Put the head after the latest earlier place of the longest run that has one."""
        earlier = self._note()
        self._head = next((at for at in earlier if at is not None), None)
        self._run = 0 if self._head is None else self._shared(self._head)

    def _note(self) -> list[int | None]:
        """Note where the last ids are; where they were before, in the order of GRAMS."""
        earlier: list[int | None] = []
        for n in GRAMS:
            if len(self._ids) >= n:
                gram, after = tuple(self._ids[-n:]), self._after[n]
                earlier.append(after.get(gram))
                after[gram] = len(self._ids)
        return earlier

    def _shared(self, head: int) -> int:
        """How many ids before the head are the last ones of all, as far as that is told apart."""
        run = 0
        while run < min(head, _LONGEST_RUN) and self._ids[head - 1 - run] == self._ids[-1 - run]:
            run += 1
        return run
