"""Whether the way positions are grouped leaves a trace in what a graph computes, to the last bit.

docs/ARCHITECTURE.md, determinism, says what a node makes of it. Does not know who runs the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from export.forms.values import Floats
from export.spec import MIN_CONTEXT_TOKENS

UNIT_TOKENS = MIN_CONTEXT_TOKENS
"""The trial prompt is a multiple of this."""

_SLOTS = 8
_CHUNKS_TOKENS = (2, 3, 8, 16, 48)  # each divides the unit: no chunk of one token is ever read

Ids: TypeAlias = NDArray[np.int64]


class Slots(Protocol):
    """A model that runs, and its cache: `pool` [2 * layers, slots, heads, positions, head_dim]."""

    pool: NDArray[Any]

    def begin(self, slots: int, capacity: int) -> None:
        """Forget everything; room for `slots` sequences of `capacity` positions."""
        ...

    def chunk(self, start: int, ids: Sequence[int] | Ids, wanted: Sequence[int] | Ids) -> Floats:
        """Read ids into the first slot from position `start` on; logits [len(wanted), vocab] of some of them."""
        ...

    def step(self, slot: int, ids: Ids, lengths: NDArray[np.int32], wanted: Ids) -> Floats:
        """Run ids [b, s] in adjacent slots; lengths [b] after the step; logits [len(wanted), vocab]."""
        ...


@dataclass(frozen=True)
class Invariance:
    """On one machine's processor.

    chunks: a prompt's caches and logits are the same for all chunk lengths of two tokens or more.
    batches: a decoded token's are the same alone and among others.
    """

    chunks: bool
    batches: bool


def trial_tokens(window_tokens: int, context_tokens: int) -> int:
    """How long a prompt is tried: longer than the attention window, if the context is."""
    units = min(window_tokens // UNIT_TOKENS + 1, context_tokens // UNIT_TOKENS)
    return units * UNIT_TOKENS


def measure_invariance(run: Slots, prompt: Ids) -> Invariance:
    """Run the graph on what must come out equal; the prompt's length is that of `trial_tokens`.

    The prompt is read in chunks of several lengths. Then eight sequences of different lengths, its beginnings, decode
    one token each, alone and as one batch.
    """
    logits = _read(run, prompt, len(prompt))
    cache = run.pool[:, 0].copy()
    chunks = True
    for chunk_tokens in _CHUNKS_TOKENS:
        again = _read(run, prompt, chunk_tokens)
        chunks &= _same_bits(logits, again) and _same_bits(cache, run.pool[:, 0])
    run.pool[:, 1:] = run.pool[:, :1]
    lengths = np.arange(1, _SLOTS + 1, dtype=np.int32) * (len(prompt) // _SLOTS)
    tokens = prompt[lengths - 1, None]
    alone = [run.step(slot, tokens[slot : slot + 1], lengths[slot : slot + 1], np.arange(1)) for slot in range(_SLOTS)]
    pool = run.pool.copy()
    together = run.step(0, tokens, lengths, np.arange(_SLOTS))
    return Invariance(chunks, _same_bits(np.concatenate(alone), together) and _same_bits(pool, run.pool))


def _read(run: Slots, prompt: Ids, chunk_tokens: int) -> Floats:
    """Prefill the first slot; returns the logits of the last two positions."""
    run.begin(_SLOTS, len(prompt))
    for start in range(0, len(prompt), chunk_tokens):
        logits = run.chunk(start, prompt[start : start + chunk_tokens], [chunk_tokens - 2, chunk_tokens - 1])
    return logits


def _same_bits(first: NDArray[Any], second: NDArray[Any]) -> bool:
    return first.shape == second.shape and first.tobytes() == second.tobytes()
