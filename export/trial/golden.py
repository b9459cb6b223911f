"""Golden prompts: how a variant continues a few prompts, so that any machine can tell whether it computes the same.

Prompts are real text in the model's own ids, and one pattern of ids that no text has. Ids come by the rule that every
node follows (docs/ARCHITECTURE.md, determinism): the prompt through the chunk path, each id after it through the
one-token path, the largest logit below `tokenizer_size` wins, the lowest id among equals, and a stop id is the last.

A processor of another kind rounds otherwise, and 8-bit activations amplify a last bit to as much as 0.7 of a logit.
`retrace` therefore walks along the golden ids and asks of each how far it is from the best: not at all, and it is
reproduced; less than EPSILON at worst, and the difference is explained by rounding; else it is broken.
Does not know graphs, files or who computes the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from core.manifest import Golden
from export.errors import TargetError
from export.forms.values import Floats

IDS = 24
"""How many ids a prompt is continued by, unless a stop id comes first."""

EPSILON = 1.0
"""Logits by which a golden id may miss the best one on another machine."""

LENGTHS = (64, 48, 32, 24, 16, 8)
"""Lengths of prompts, longest first: a node reads each in one chunk, without padding, as it was read here."""

_TEXTS = (
    "The lighthouse keeper wrote down the weather three times a day: once before breakfast, once at noon, and once "
    "when the lamp was lit. In the evening of the ninth of March he wrote",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n    return",
    "问：水在高山上为什么不到一百度就会沸腾？\n答：",
)
_CHECKPOINT = (
    "the checkpoint holds weights that are no numbers, or too large to be computed with in this form: compare its "
    "files with where they came from, or take another recipe"
)
_RELEASE = "do not use this release, export it again"
_PATTERN_STEP = 7919  # a prime: neighbours have nothing to do with each other


class Decoder(Protocol):
    """One sequence of a model that runs."""

    def read(self, prompt: Sequence[int]) -> Floats:
        """Forget what was before and read at least two ids as one chunk; logits [vocab] of the last."""
        ...

    def step(self, token: int) -> Floats:
        """Read one id through the one-token path; its logits [vocab]."""
        ...


@dataclass(frozen=True)
class Retraced:
    """A golden prompt computed again: the position of the first id that is not the best one, if there is one, and by
    how many logits the worst of all ids misses the best one of its position."""

    first_difference: int | None
    gap: float

    @property
    def is_reproduced(self) -> bool:
        """Whether every id came out again."""
        return self.first_difference is None

    @property
    def is_explained(self) -> bool:
        """Whether the ids differ by no more than the rounding of another processor."""
        return self.gap < EPSILON


def prompts(encode: Callable[[str], Sequence[int]], tokenizer_size: int, context_tokens: int) -> list[list[int]]:
    """Ids of the prompts of a model, each of one of LENGTHS and short enough to be continued."""
    most = context_tokens - IDS
    pattern = [index * _PATTERN_STEP % tokenizer_size for index in range(LENGTHS[0])]
    texts = [[token for token in encode(text) if token < tokenizer_size] for text in _TEXTS]
    cut = [ids[: _length(min(len(ids), most))] for ids in (*texts, pattern)]
    return [ids for ids in cut if ids]


def _length(most: int) -> int:
    return next((length for length in LENGTHS if length <= most), 0)


def continue_greedily(
    decoder: Decoder, prompt: Sequence[int], tokenizer_size: int, stop_ids: Sequence[int], made_by: str
) -> Golden:
    """What a model that is being exported answers; raises TargetError if its logits are no numbers."""
    ids: list[int] = []
    margins: list[float] = []
    logits = decoder.read(prompt)
    while True:
        best, margin = _best(logits[:tokenizer_size], _CHECKPOINT)
        ids.append(best)
        margins.append(margin)
        if len(ids) == IDS or best in stop_ids:
            return Golden(list(prompt), ids, min(margins), made_by)
        logits = decoder.step(best)


def retrace(decoder: Decoder, golden: Golden, tokenizer_size: int) -> Retraced:
    """Compare a model with what another machine, or another day, made of it."""
    first: int | None = None
    gaps: list[float] = []
    logits = decoder.read(golden.prompt_ids)
    for position, token in enumerate(golden.ids):
        if position:
            logits = decoder.step(golden.ids[position - 1])
        row = logits[:tokenizer_size]
        best, _ = _best(row, _RELEASE)
        gaps.append(float(row[best]) - float(row[token]) if token < tokenizer_size else math.inf)
        if token != best and first is None:
            first = position
    return Retraced(first, max(gaps, default=math.inf))


def _best(row: Floats, advice: str) -> tuple[int, float]:
    """The best id of a row of logits, and its distance from the second best; advice: if there is none."""
    best = int(row.argmax())  # the lowest id among equals; a NaN if there is one
    if not math.isfinite(row[best]):
        raise TargetError(f"The graph computes logits that are no numbers; {advice}.")
    second, first = np.partition(row, -2)[-2:].astype(np.float64)
    return best, float(first - second)
