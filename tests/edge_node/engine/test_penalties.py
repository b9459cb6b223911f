from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.frames import Sampling
from edge_node.engine.penalties import History, adjusted, needs_history
from edge_node.engine.step import Logits

SIZE = 12
ids = st.lists(st.integers(0, SIZE + 2), max_size=40)
logits = st.lists(
    st.sampled_from([-math.inf, -30.0, -2.5, -1.0, -0.0, 0.0, 0.5, 0.5, 3.0, 40.0]), min_size=SIZE, max_size=SIZE
)
samplings = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.25, 2.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 2.0]),
    logit_bias=st.lists(st.tuples(st.sampled_from([0, 3, 11, 12, 2**63, -1]), st.sampled_from([-100.0, 1.5, 100.0]))),
)


def told(prompt: list[int], output: list[int]) -> History:
    history = History(prompt)
    for token in output:
        history.push(token)
    return history


def plainly(row: list[float], sampling: Sampling, prompt: list[int], output: list[int]) -> list[float]:
    """The definitions, one id at a time."""
    row, counts = list(row), Counter(output)
    for token, bias in sampling.logit_bias:
        if 0 <= token < len(row):
            row[token] += bias
    for token in range(len(row)):
        if token in prompt or token in counts:
            penalty = sampling.repetition_penalty
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        row[token] -= sampling.frequency_penalty * counts[token] + sampling.presence_penalty * (counts[token] > 0)
    return row


@given(logits, samplings, ids, ids)
def test_a_row_is_adjusted_as_the_definitions_say(
    row: list[float], sampling: Sampling, prompt: list[int], output: list[int]
) -> None:
    given_row = np.array(row, np.float32)
    changed = adjusted(given_row, sampling, told(prompt, output))
    assert changed.dtype == np.float32
    assert changed.tolist() == pytest.approx(plainly(row, sampling, prompt, output), rel=1e-5, abs=1e-5)
    assert given_row.tolist() == row, "the runner's buffer is not ours to change"


@given(ids, ids)
def test_a_history_holds_each_id_once_and_counts_the_output_alone(prompt: list[int], output: list[int]) -> None:
    history = told(prompt, output)
    counts = dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True))
    assert len(history.ids) == len(counts)
    assert counts == {token: Counter(output)[token] for token in {*prompt, *output}}


def test_a_history_grows_with_distinct_ids_only() -> None:
    history = told([5], list(range(100)) * 30)
    assert sorted(history.ids.tolist()) == list(range(100))
    assert set(history.counts.tolist()) == {30}


def test_repetition_counts_the_prompt_and_the_others_do_not() -> None:
    row = np.array([2, 2, -2, 2], np.float32)
    history = told([0, 2], [1])
    assert adjusted(row, Sampling(repetition_penalty=2.0), history).tolist() == [1, 1, -4, 2]
    assert adjusted(row, Sampling(presence_penalty=0.5), history).tolist() == [2, 1.5, -2, 2]
    assert adjusted(row, Sampling(frequency_penalty=0.5), told([0], [1, 1, 3])).tolist() == [2, 1, -2, 1.5]


def test_without_wishes_the_row_is_not_even_copied() -> None:
    row: Logits = np.array([1, 2], np.float32)
    assert adjusted(row, Sampling(), told([0], [1])) is row


@pytest.mark.parametrize(
    ("sampling", "needed"),
    [
        (Sampling(0.3, 0.5, 9, 0.1, logit_bias=[(1, 2.0)]), False),
        (Sampling(repetition_penalty=1.1), True),
        (Sampling(presence_penalty=-0.1), True),
        (Sampling(frequency_penalty=0.1), True),
    ],
)
def test_only_penalties_need_the_ids_so_far(sampling: Sampling, needed: bool) -> None:
    assert needs_history(sampling) is needed
