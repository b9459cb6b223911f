from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from export.forms.quantize import farthest, quantize
from export.forms.values import Doubles, Floats
from tests.export.numbers import FLOAT16, FLOAT32

BLOCK = 32
weights = arrays.arrays(
    np.float32, (2, BLOCK), elements=st.floats(-100, 100, width=32) | st.floats(-(2.0**-20), 2.0**-20, width=32)
)


def meaning(codes: np.ndarray[Any, Any], scales: np.ndarray[Any, Any], bits: int) -> Doubles:
    return (codes.astype(np.float64) - (1 << (bits - 1))) * scales.astype(np.float64)[..., None]


def relative_error(source: Floats, bits: int) -> float:
    codes, scales = quantize(source, bits, BLOCK, FLOAT32)
    errors = meaning(codes, scales, bits).reshape(source.shape) - source
    return float(np.sqrt((errors**2).sum() / (source.astype(np.float64) ** 2).sum()))


@pytest.mark.parametrize("floats", [FLOAT32, FLOAT16])
@pytest.mark.parametrize("bits", [4, 8])
@given(source=weights)
def test_no_other_code_is_nearer_under_the_scale_as_it_is_stored(
    bits: int, floats: np.dtype[Any], source: Floats
) -> None:
    codes, scales = quantize(source, bits, BLOCK, floats)
    every = np.arange(1 << bits) - float(1 << (bits - 1))
    numbers = source.reshape(2, 1, BLOCK).astype(np.float64)
    steps = scales.astype(np.float64)[..., None]
    nearest = np.abs(numbers[..., None] - every * steps[..., None]).min(axis=-1)
    errors = np.abs(meaning(codes, scales, bits) - numbers)
    assert (errors <= nearest + np.abs(steps) * 2.0**-16).all()
    assert (errors <= farthest(numbers, scales, bits)).all()
    assert (farthest(numbers, scales, bits) <= np.abs(steps) * (1 + 2.0**-16)).all()


@pytest.mark.parametrize("bits", [4, 8])
@given(source=weights)
@example(source=np.tile(np.array([1, -1], np.float32), (2, BLOCK // 2)))
def test_the_extreme_weight_is_kept(bits: int, source: Floats) -> None:
    codes, scales = quantize(source, bits, BLOCK, FLOAT32)
    sizes = np.abs(source)
    is_extreme = sizes == sizes.max(axis=-1, keepdims=True)  # one of them: 1 and -1 cannot both be
    is_kept = np.isclose(meaning(codes, scales, bits).reshape(source.shape), source, rtol=1e-6, atol=2.0**-140)
    assert (is_extreme & is_kept).any(axis=-1).all()


def test_a_block_of_zeros_has_scale_zero_and_the_middle_code() -> None:
    codes, scales = quantize(np.zeros((1, BLOCK), np.float32), 8, BLOCK, FLOAT16)
    assert scales.tolist() == [[0.0]]
    assert not np.signbit(scales).any()
    assert (codes == 128).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_too_small_for_a_normal_scale_stay_within_half_a_step(bits: int) -> None:
    source = np.linspace(-1, 0.9, BLOCK, dtype=np.float32)[None]
    for size, floats in ((1e-42, FLOAT32), (2.0**-20, FLOAT16)):
        tiny = source * np.float32(size)
        codes, scales = quantize(tiny, bits, BLOCK, floats)
        assert (scales != 0).all()
        errors = np.abs(meaning(codes, scales, bits)[0, 0] - tiny[0])
        assert (errors <= np.abs(scales.astype(np.float64)).item() * 0.5001).all()


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    source = np.full((1, BLOCK), 1e8, np.float32)
    assert quantize(source, 8, BLOCK, FLOAT32)
    with pytest.raises(ValueError, match="scales outside float16's range"):
        quantize(source, 8, BLOCK, FLOAT16)


@pytest.mark.parametrize(("bits", "expected"), [(8, 0.00532), (4, 0.0860)])
def test_the_error_on_normal_weights_is_what_the_module_says(bits: int, expected: float) -> None:
    source = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
    assert relative_error(source, bits) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_sign_of_the_scale_is_worth_a_part_of_the_error(bits: int) -> None:
    source = np.random.default_rng(0).standard_t(4, (256, 1024)).astype(np.float32)
    half = 1 << (bits - 1)
    steps = np.abs(source.reshape(256, -1, BLOCK)).max(axis=-1, keepdims=True) / (half - 1)
    unsigned = np.rint(source.reshape(256, -1, BLOCK) / steps) * steps
    error = np.sqrt(((unsigned.reshape(source.shape) - source) ** 2).sum() / (source**2).sum())
    assert relative_error(source, bits) < error


def test_rows_are_quantised_each_for_itself() -> None:
    source = np.random.default_rng(1).normal(size=(700, 96)).astype(np.float32)
    codes, scales = quantize(source, 4, BLOCK, FLOAT32)
    parts = [quantize(source[start : start + 100], 4, BLOCK, FLOAT32) for start in range(0, 700, 100)]
    assert np.array_equal(codes, np.concatenate([part for part, _ in parts]))
    assert np.array_equal(scales, np.concatenate([part for _, part in parts]))
