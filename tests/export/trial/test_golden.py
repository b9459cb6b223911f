from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from core.manifest import Golden
from edge_node.engine.ladder import LADDER
from export.errors import TargetError
from export.forms.values import Floats
from export.trial.golden import EPSILON, IDS, LENGTHS, continue_greedily, prompts, retrace

STOP = 7


@dataclass
class Chain:
    """A model whose next logits depend on the last id alone; it notes how each id was read."""

    rows: dict[int, list[float]]
    log: list[tuple[str, list[int]]] = field(default_factory=list)

    def read(self, prompt: Sequence[int]) -> Floats:
        self.log.append(("chunk", list(prompt)))
        return np.array(self.rows[prompt[-1]], np.float32)

    def step(self, token: int) -> Floats:
        self.log.append(("step", [token]))
        return np.array(self.rows[token], np.float32)


def favouring(best: int, by: float = 4.0, size: int = 10) -> list[float]:
    """Logits that put one id before all others."""
    return [by if index == best else 0.0 for index in range(size)]


def counting() -> Chain:
    """1 is followed by 2, 2 by 3, and so on to STOP."""
    return Chain({token: favouring(token + 1) for token in range(9)})


def in_words(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def test_a_prompt_is_one_chunk_and_every_id_after_it_a_step() -> None:
    model = counting()
    golden = continue_greedily(model, [5, 3], 10, [STOP], "here")
    assert golden == Golden([5, 3], [4, 5, 6, STOP], 4.0, "here")
    assert model.log == [("chunk", [5, 3]), ("step", [4]), ("step", [5]), ("step", [6])]


def test_without_a_stop_id_a_prompt_is_continued_by_a_fixed_number_of_ids() -> None:
    model = Chain({1: favouring(2), 2: favouring(1)})
    assert continue_greedily(model, [1, 2], 10, [], "here").ids == [1, 2] * (IDS // 2)


def test_the_lowest_id_wins_among_equals_and_the_margin_is_the_smallest_on_the_way() -> None:
    model = Chain({1: favouring(2, by=3.0), 2: [0.0, 0.0, 0.0, 2.0, 2.0, 0.0], 3: favouring(STOP)})
    golden = continue_greedily(model, [0, 1], 10, [STOP], "here")
    assert (golden.ids, golden.min_margin) == ([2, 3, STOP], 0.0)


def test_padding_ids_are_never_chosen() -> None:
    model = Chain({1: [0.0, 0.0, 1.0, 9.0], 2: [5.0, 0.0, 0.0, 9.0]})
    golden = continue_greedily(model, [1, 1], 3, [0], "here")
    assert (golden.ids, golden.min_margin) == ([2, 0], 1.0)


def test_logits_that_are_no_numbers_are_the_checkpoint_s_fault_in_an_export_and_the_release_s_afterwards() -> None:
    model = Chain({1: [math.nan] * 3})
    with pytest.raises(TargetError, match="the checkpoint holds weights that are no numbers"):
        continue_greedily(model, [1], 3, [0], "here")
    with pytest.raises(TargetError, match="do not use this release"):
        retrace(model, Golden([1], [2], 0.0, "here"), 3)


@pytest.mark.parametrize("nonsense", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(nonsense: float) -> None:
    with pytest.raises(TargetError, match="no numbers"):
        continue_greedily(Chain({1: [0.0, nonsense, 0.0]}), [1, 1], 3, [], "here")


def test_what_a_model_said_is_reproduced_by_the_same_model() -> None:
    golden = continue_greedily(counting(), [5, 3], 10, [STOP], "here")
    again = retrace(counting(), golden, 10)
    assert (again.is_reproduced, again.is_explained, again.gap) == (True, True, 0.0)


def test_a_near_tie_that_falls_the_other_way_is_explained() -> None:
    golden = Golden([5, 3], [4, 9, 6, STOP], 0.0, "there")
    model = counting()
    model.rows[4][9] = model.rows[4][5] - EPSILON / 2
    model.rows[9] = favouring(6)
    again = retrace(model, golden, 10)
    assert (again.first_difference, again.is_reproduced, again.is_explained) == (1, False, True)
    assert again.gap == EPSILON / 2


def test_the_golden_ids_are_followed_past_a_difference() -> None:
    golden = Golden([5, 3], [4, 9, 2, STOP], 0.0, "there")
    model = counting()
    model.rows[4][9] = model.rows[4][5] - EPSILON / 2
    model.rows[9] = favouring(6)
    again = retrace(model, golden, 10)
    assert (again.first_difference, again.is_explained, again.gap) == (1, False, 4.0)


@pytest.mark.parametrize("strange", [8, 10, 10_000])
def test_an_id_that_was_never_near_is_broken(strange: int) -> None:
    again = retrace(counting(), Golden([5, 3], [4, 5, strange], 4.0, "there"), 10)
    assert (again.first_difference, again.is_explained) == (2, False)


def test_prompts_have_lengths_that_a_node_reads_in_one_chunk_and_leave_room_for_an_answer() -> None:
    def in_letters(text: str) -> list[int]:
        return [ord(letter) % 50 for letter in text]

    found = prompts(in_letters, 50, 4096)
    assert set(LENGTHS) <= set(LADDER)
    assert len(found) == 4
    assert all(len(ids) in LENGTHS and max(ids) < 50 for ids in found)
    assert [len(ids) for ids in prompts(in_letters, 50, 48)] == [24, 24, 16, 24]


def test_a_text_of_too_few_ids_is_no_prompt() -> None:
    found = prompts(lambda text: [1, 2, 3], 50, 4096)
    assert [len(ids) for ids in found] == [64]


def test_ids_that_the_tokenizer_does_not_know_are_in_no_prompt() -> None:
    found = prompts(lambda text: list(range(100)), 50, 4096)
    assert all(max(ids) < 50 for ids in found)
