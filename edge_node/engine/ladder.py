"""Which stretch of a prompt to read next.

Chunk lengths come from a fixed ladder: every new shape makes ONNX Runtime's arena grow. A chunk has
at least two tokens, because a lone one would take the one-token path, whose last bits differ
(docs/decisions/020-one-rule-and-the-ladder.md). The end of a prompt therefore seldom fits, and a stretch may

    |--------- prompt ---------|-- spare capacity --|
               computed^
                  [re-read][new]                       begin before what is computed: the same bits again
    [new......................][padding]               go beyond a short prompt: overwritten before it is read

Does not know sequences or costs.
"""

from __future__ import annotations

from dataclasses import dataclass

LADDER = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

VERIFIED_LENGTHS = (2, 4, 8, 16)
"""Of them, those at which a draft is verified: the id that is known and what may follow it."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Positions start .. start+length; those at or beyond the prompt's end are padding."""

    start: int
    length: int


def next_stretch(computed: int, prompt_tokens: int, capacity: int, most: int) -> Stretch:
    """The next chunk of a prompt of which `computed` < `prompt_tokens` positions are in the cache.

    capacity (at least 2): positions of the slot, more than prompt_tokens. most: the longest chunk
    wanted; one step of the ladder is always granted.
    """
    steps = [step for step in LADDER if step <= min(most, capacity)] or [LADDER[0]]
    left = prompt_tokens - computed
    if left > steps[-1]:
        return Stretch(computed, steps[-1])
    length = next(step for step in steps if step >= left)
    return Stretch(max(0, min(computed, prompt_tokens - length)), length)


def longest_within(costs: dict[int, float], budget_s: float, most: int) -> int:
    """The longest step whose cost is within the budget, at least the shortest step; `costs` covers the ladder."""
    return max((step for step in LADDER if step <= most and costs[step] <= budget_s), default=LADDER[0])
