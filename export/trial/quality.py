"""How well a model predicts a text, and how near its logits are to a reference's.

Perplexity; KL divergence from the reference to this, in nats a position; share of positions with the same best id.
Everything is summed in float64, a row at a time: logits of a whole text need not fit into memory.
Does not know who computed the logits, or which text it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import exp, log, prod

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.errors import TargetError
from export.forms.values import Doubles, Floats
from export.spec import TensorInfo

REFERENCE_BYTES_MAX = 2_000_000_000
"""Models up to this size in float32 are compared with themselves in float32."""

_SURPRISE_MAX = log(np.finfo(np.float64).max)


class Distance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one set of logits from a reference's. perplexity is the reference's; largest_difference is in logits."""

    perplexity: float
    kl_divergence: float
    top1_agreement: float
    largest_difference: float


class Score(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a whole text; distance None: there was no reference. positions: how many ids were predicted."""

    positions: int
    perplexity: float
    distance: Distance | None


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What came of reading a text; part of a release's quality.json (`export/trial/quality_report.py`).

    reference: what `score.distance` is the distance from; where that is None, why there is none.
    """

    text: str
    score: Score
    reference: str
    made_by: str


@dataclass(frozen=True)
class Part:
    """Some positions of a text: logits [n, vocab], the ids that follow [n], and perhaps the reference's logits."""

    logits: Floats
    following: NDArray[np.int64]
    expected: Floats | None


def score(parts: Iterable[Part]) -> Score:
    """Sum up all positions, at least one; either all parts have a reference or none has.

    Raises TargetError for logits of which no perplexity can be told.
    """
    surprises: list[float] = []
    expected_surprises: list[float] = []
    divergences: list[float] = []
    agreements: list[bool] = []
    differences: list[float] = []
    for part in parts:
        for row, (logits, following) in enumerate(zip(part.logits, part.following, strict=True)):
            chances = log_softmax(logits)
            surprises.append(-float(chances[following]))
            if part.expected is None:
                continue
            expected = part.expected[row]
            their_chances = log_softmax(expected)
            expected_surprises.append(-float(their_chances[following]))
            divergences.append(float((np.exp(their_chances) * (their_chances - chances)).sum()))
            agreements.append(bool(logits.argmax() == expected.argmax()))
            differences.append(float(np.abs(logits.astype(np.float64) - expected).max()))
    perplexity = _perplexity(surprises)
    if not divergences:
        return Score(len(surprises), perplexity, None)
    distance = Distance(
        _perplexity(expected_surprises), float(np.mean(divergences)), float(np.mean(agreements)), max(differences)
    )
    return Score(len(surprises), perplexity, distance)


def _perplexity(surprises: list[float]) -> float:
    mean = float(np.mean(surprises))
    if not mean <= _SURPRISE_MAX:  # nor if it is no number
        raise TargetError(
            "The model's logits are so large, or no numbers, that no perplexity can be told; its checkpoint is not of "
            "a trained model, or damaged: compare its files with where they came from."
        )
    return exp(mean)


def log_softmax(logits: NDArray[np.floating]) -> Doubles:
    """Logarithms of probabilities over the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    result: Doubles = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def why_no_reference(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Why a model is not compared with its own float32 form; None if it can be."""
    size_bytes = sum(4 * prod(tensor.shape) for tensor in tensors.values())
    if size_bytes <= REFERENCE_BYTES_MAX:
        return None
    return (
        f"in float32 the model takes {size_bytes / 1e9:.1f} GB; "
        f"a reference is made of models up to {REFERENCE_BYTES_MAX / 1e9:.0f} GB"
    )
