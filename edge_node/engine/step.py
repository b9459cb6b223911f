"""One step of the model: what the scheduler asks for and what a runner answers.

The order of the two parts does not matter to the result: they touch different slots, and a dummy
row writes only where its slot's owner will write before it reads.
Does not know sequences, sampling or how a model is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Logits: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Read `ids` (at least two) into positions start .. start+len(ids) of one slot.

    wanted: index into `ids` of the position whose logits are needed, None for none.
    """

    slot: int
    start: int
    ids: list[int]
    wanted: int | None


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
class StepPlan:
    """At most one chunk and one decode batch. predicted_s: how long it should take, for the watchdog."""

    number: int
    chunk: Chunk | None
    decode: Decode | None
    predicted_s: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """Logits of what was wanted, and what each part cost.

    chunk_logits [vocab], None if none was wanted; decode_logits [len(decode.wanted), vocab].
    Both may be views of the runner's buffers, valid until its next run.
    """

    chunk_logits: Logits | None
    decode_logits: Logits | None
    chunk_s: float = 0.0
    decode_s: float = 0.0


class StepRunner(Protocol):
    """What the engine's loop needs of a runner (edge_node.runtime.runner, or a fake)."""

    def run(self, plan: StepPlan) -> StepResult: ...
