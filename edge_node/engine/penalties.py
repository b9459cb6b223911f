"""Change logits by what the request wishes for and what was said: logit bias, then penalties.

Order, as in vLLM and transformers: bias, repetition penalty, then frequency and presence penalty. Ids that the
tokenizer does not know are ignored. Does not know how an id is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from core.frames import Sampling
from edge_node.engine.step import Logits


class History:
    """The distinct ids of prompt and output, and how often each is in the output.

    Invariant: `_places` maps each id to its index in `_ids` and `_counts`, of which the first len(_places) are in use.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._ids = np.fromiter(self._places, np.intp, len(self._places))
        self._counts = np.zeros(len(self._places), np.float32)

    def push(self, token: int) -> None:
        """Count one id of the output."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            spare = len(self._ids) + 64
            self._ids = np.concatenate([self._ids, np.zeros(spare, np.intp)])
            self._counts = np.concatenate([self._counts, np.zeros(spare, np.float32)])
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> NDArray[np.intp]:
        """Each id of prompt and output once."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often ids[i] is in the output; 0 for what is in the prompt alone."""
        return self._counts[: len(self._places)]


def needs_history(sampling: Sampling) -> bool:
    """Whether the choice depends on the ids so far."""
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def adjusted(row: Logits, sampling: Sampling, history: History | None) -> Logits:
    """The row with bias and penalties; the row itself where there are none, never changed."""
    penalised = history is not None and needs_history(sampling)
    if not sampling.logit_bias and not penalised:
        return row
    row = row.copy()
    _add_bias(row, sampling.logit_bias)
    if history is not None and penalised:
        _penalise(row, sampling, history)
    return row


def _add_bias(row: Logits, logit_bias: list[tuple[int, float]]) -> None:
    known = [pair for pair in logit_bias if 0 <= pair[0] < len(row)]
    if known:
        ids, values = zip(*known, strict=True)
        np.add.at(row, np.array(ids, np.intp), np.array(values, np.float32))


def _penalise(row: Logits, sampling: Sampling, history: History) -> None:
    """Repetition as transformers and vLLM define it (Keskar et al. 2019), frequency and presence as OpenAI does."""
    ids, counts = history.ids, history.counts
    if len(ids) and ids.max() >= len(row):
        known = np.flatnonzero(ids < len(row))
        ids, counts = ids[known], counts[known]
    logits = row[ids]
    if sampling.repetition_penalty != 1:
        penalty = np.float32(sampling.repetition_penalty)
        logits = np.where(logits > 0, logits / penalty, logits * penalty)
    if sampling.frequency_penalty != 0:
        logits -= np.float32(sampling.frequency_penalty) * counts
    if sampling.presence_penalty != 0:
        logits -= np.float32(sampling.presence_penalty) * (counts > 0)
    row[ids] = logits
