from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.forms.values import Floats
from export.trial.invariance import Ids, Invariance, measure_invariance, trial_tokens

VOCAB = 5
PROMPT: Ids = np.arange(96) % VOCAB


@dataclass
class Averages:
    """A model that sums up its ids; `trace` is added to what a run of that shape (rows, tokens) computes."""

    in_cache: dict[tuple[int, int], float] = field(default_factory=dict)
    in_logits: dict[tuple[int, int], float] = field(default_factory=dict)
    pool: NDArray[Any] = field(init=False)
    shapes: set[tuple[int, int]] = field(default_factory=set)

    def begin(self, slots: int, capacity: int) -> None:
        self.pool = np.zeros((2, slots, 1, capacity, 1), np.float32)

    def chunk(self, start: int, ids: Sequence[int] | Ids, wanted: Sequence[int] | Ids) -> Floats:
        return self.step(0, np.array([ids]), np.array([start + len(ids)], np.int32), np.array(wanted))

    def step(self, slot: int, ids: Ids, lengths: NDArray[np.int32], wanted: Ids) -> Floats:
        rows, tokens = ids.shape
        self.shapes.add((rows, tokens))
        sums = []
        for row, end in enumerate(lengths):
            cache = self.pool[:, slot + row, 0, :, 0]
            cache[:, end - tokens : end] = ids[row] + self.in_cache.get((rows, tokens), 0.0)
            sums += [cache[0, : end - tokens + token + 1].sum() for token in range(tokens)]
        logits = np.array(sums, np.float32)[wanted, None] * np.ones(VOCAB, np.float32)
        return logits + np.float32(self.in_logits.get((rows, tokens), 0.0))


def test_a_model_that_heeds_ids_alone_is_invariant() -> None:
    run = Averages()
    assert measure_invariance(run, PROMPT) == Invariance(chunks=True, batches=True)
    assert run.shapes == {(1, 96), (1, 2), (1, 3), (1, 8), (1, 16), (1, 48), (1, 1), (8, 1)}


@pytest.mark.parametrize("tokens", [2, 3, 8, 16, 48, 96])
def test_a_trace_of_a_chunk_s_length_is_seen(tokens: int) -> None:
    least = float(np.finfo(np.float32).eps)
    assert measure_invariance(Averages(in_logits={(1, tokens): 1e-4}), PROMPT) == Invariance(False, True)
    assert measure_invariance(Averages(in_cache={(1, tokens): least}), PROMPT).chunks is False


@pytest.mark.parametrize("rows", [1, 8])
def test_a_trace_of_the_batch_is_seen(rows: int) -> None:
    assert measure_invariance(Averages(in_logits={(rows, 1): 1e-4}), PROMPT) == Invariance(True, False)
    assert measure_invariance(Averages(in_cache={(rows, 1): 1e-4}), PROMPT) == Invariance(True, False)


def test_the_prompt_is_longer_than_the_window_where_the_context_allows() -> None:
    assert trial_tokens(0, 2048) == 48
    assert trial_tokens(128, 2048) == 144
    assert trial_tokens(144, 2048) == 192
    assert trial_tokens(128, 140) == 96
