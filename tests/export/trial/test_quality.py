from __future__ import annotations

from math import exp, log

import numpy as np
import pytest

from export.errors import TargetError
from export.forms.values import Floats
from export.spec import Kind, TensorInfo
from export.trial.quality import REFERENCE_BYTES_MAX, Part, log_softmax, score, why_no_reference


def logits(*rows: list[float]) -> Floats:
    return np.log(np.array(rows, np.float32))


def part(mine: Floats, following: list[int], theirs: Floats | None = None) -> Part:
    return Part(mine, np.array(following), theirs)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    found = score([part(np.zeros((3, 50), np.float32), [1, 2, 49])])
    assert found.positions == 3
    assert found.perplexity == pytest.approx(50)
    assert found.distance is None


def test_the_same_logits_are_at_no_distance() -> None:
    same = np.random.default_rng(1).normal(size=(4, 9)).astype(np.float32)
    found = score([part(same, [1, 2, 3, 4], same.copy())])
    assert found.distance is not None
    assert found.distance.kl_divergence == found.distance.largest_difference == 0
    assert found.distance.top1_agreement == 1
    assert found.distance.perplexity == found.perplexity


def test_divergence_is_from_the_reference_to_this() -> None:
    mine, theirs = logits([0.5, 0.5], [0.9, 0.1]), logits([0.25, 0.75], [0.8, 0.2])
    found = score([part(mine, [0, 0], theirs)])
    assert found.distance is not None
    first = 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)
    second = 0.8 * log(0.8 / 0.9) + 0.2 * log(0.2 / 0.1)
    assert found.distance.kl_divergence == pytest.approx((first + second) / 2, rel=1e-6)
    assert found.distance.top1_agreement == 0.5
    assert found.perplexity == pytest.approx(exp(-(log(0.5) + log(0.9)) / 2), rel=1e-6)
    assert found.distance.perplexity == pytest.approx(exp(-(log(0.25) + log(0.8)) / 2), rel=1e-6)
    assert found.distance.largest_difference == pytest.approx(log(0.2 / 0.1), rel=1e-6)


def test_how_a_text_is_cut_does_not_matter() -> None:
    random = np.random.default_rng(2)
    mine, theirs = random.normal(size=(2, 6, 9)).astype(np.float32)
    following = [1, 2, 3, 4, 5, 6]
    whole = score([part(mine, following, theirs)])
    assert whole == score([part(mine[:2], following[:2], theirs[:2]), part(mine[2:], following[2:], theirs[2:])])


def test_large_logits_do_not_overflow() -> None:
    assert np.array_equal(log_softmax(np.array([[5000.0, 5000.0]])), np.log([[0.5, 0.5]]))


@pytest.mark.parametrize("value", [3e38, float("nan")])
def test_logits_without_a_perplexity_are_said_in_one_sentence(value: float) -> None:
    with pytest.raises(TargetError, match="so large, or no numbers, that no perplexity can be told"):
        score([part(np.array([[value, -value]], np.float32), [1])])


def test_the_distance_of_the_largest_logits_is_a_number() -> None:
    mine, theirs = np.array([[3e38, 0.0]], np.float32), np.array([[-3e38, 0.0]], np.float32)
    with pytest.raises(TargetError, match="no perplexity"):
        score([part(mine, [0], theirs)])
    found = score([part(np.array([[3e38, 0.0, 0.0]], np.float32), [0], np.array([[0.0, 0.0, -3e38]], np.float32))])
    assert found.distance is not None
    assert found.distance.largest_difference == pytest.approx(3e38)


def test_a_model_too_large_in_float32_has_no_reference_and_it_is_said_why() -> None:
    rows = REFERENCE_BYTES_MAX // 4 // 100
    assert why_no_reference({"w": TensorInfo("w", (rows, 100), Kind.BF16)}) is None
    large = why_no_reference({"w": TensorInfo("w", (rows, 100), Kind.BF16), "v": TensorInfo("v", (10**8,), Kind.F32)})
    assert large is not None
    assert "2.4 GB" in large
