"""One step of the model: what the scheduler asks for and what a runner answers.

    moves, loads  ->  chunk and decode batch  ->  saves

The order of chunk and batch does not matter to the result: they touch different slots, and a dummy
row writes only where its slot's owner will write before it reads. Copies keep bits.
Does not know sequences, sampling or how a model is run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Logits: TypeAlias = NDArray[np.float32]

BLOCK_TOKENS = 64
"""Positions that a prefix block holds."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Read `ids` (at least two) into positions start .. start+len(ids) of one slot.

    wanted: indices into `ids` of the positions whose logits are needed, ascending.
    """

    slot: int
    start: int
    ids: list[int]
    wanted: list[int]


@dataclass(frozen=True, slots=True)
class Decode:
    """One token for each of the adjacent slots first_slot .. first_slot+len(ids).

    ends[i]: tokens in row i's slot after this step, so that ids[i] lands at position ends[i]-1.
    wanted: rows whose logits are needed, ascending; the others are replayed ids or dummies.
    """

    first_slot: int
    ids: list[int]
    ends: list[int]
    wanted: list[int]


@dataclass(frozen=True, slots=True)
class Move:
    """Copy the first `tokens` positions of slot `source` to slot `target`."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """Copy prefix blocks to a slot: blocks[i] holds its positions BLOCK_TOKENS * i and on."""

    slot: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Save:
    """Copy positions of a slot to prefix blocks: blocks[i] takes those from BLOCK_TOKENS * (first + i) on."""

    slot: int
    first: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """At most one chunk and one decode batch, and copies before and after them.

    predicted_s: how long it should take, for the watchdog. Moves are carried out in their order.
    """

    number: int
    chunk: Chunk | None
    decode: Decode | None
    predicted_s: float
    moves: list[Move] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Logits of what was wanted, and what each part cost.

    chunk_logits [len(chunk.wanted), vocab], decode_logits [len(decode.wanted), vocab]; None without that part.
    Both may be views of the runner's buffers, valid until its next run. copy_s: moves, loads and saves together.
    """

    chunk_logits: Logits | None
    decode_logits: Logits | None
    chunk_s: float = 0.0
    decode_s: float = 0.0
    copy_s: float = 0.0


class StepRunner(Protocol):
    """What the engine's loop needs of a runner (edge_node.runtime.runner, or a fake)."""

    def run(self, plan: StepPlan) -> StepResult: ...
