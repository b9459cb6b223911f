from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.forms.form import Form
from export.forms.matrix import Corrected, DenseFloat, Symmetric, ZeroPointed
from export.forms.values import Blocks, Doubles, Floats, Plain, Values
from tests.export.numbers import FLOAT16, FLOAT32, plain, q4_1, q4_k, q6_k, symmetric
from tests.export.one_node import initialisers, run_node

Q4_0, Q8_0 = symmetric(4, 32), symmetric(8, 32)

CASES: list[tuple[Form, Values]] = [
    (DenseFloat(FLOAT32), plain()),
    (DenseFloat(FLOAT32, exact=False), q4_k()),
    (DenseFloat(FLOAT16, exact=False), plain()),
    (Symmetric(4, 32, FLOAT32), Q4_0),
    (Symmetric(4, 32, FLOAT16), Q4_0),
    (Symmetric(8, 32, FLOAT16), Q8_0),
    (Symmetric(8, 16, FLOAT32), q6_k()),
    (Symmetric(8, 16, FLOAT16, exact=False), q6_k()),
    (Symmetric(8, 32, FLOAT32, exact=False), plain()),
    (Symmetric(4, 32, FLOAT16, exact=False), plain()),
    (Corrected(4, 32, FLOAT32), q4_1()),
    (Corrected(4, 32, FLOAT32), q4_k()),
    (Corrected(4, 32, FLOAT16), q4_k()),
    (ZeroPointed(4, 32, FLOAT32), q4_1()),
    (ZeroPointed(4, 32, FLOAT32), q4_k()),
]
forms = pytest.mark.parametrize(("form", "source"), CASES, ids=[f"{form!r}"[:60] for form, _ in CASES])


def errors_of(form: Form, source: Values) -> Doubles:
    return np.abs(form.decode(form.encode(source)) - source.to_doubles())


@forms
def test_a_form_stores_what_it_says_beforehand(form: Form, source: Values) -> None:
    arrays = form.encode(source)
    rows, columns = source.to_doubles().shape
    stored = form.stored(rows, columns)
    assert list(arrays) == list(stored)
    for name, array in arrays.items():
        assert (array.shape, array.dtype) == (stored[name].shape, stored[name].dtype)
        assert array.nbytes == stored[name].size_bytes


@forms
def test_no_weight_is_farther_away_than_the_bound(form: Form, source: Values) -> None:
    errors = errors_of(form, source)
    assert (errors <= form.bound(source, form.encode(source))).all()
    assert not form.exact or not errors.any()


@forms
def test_slices_of_rows_joined_are_the_whole(form: Form, source: Values) -> None:
    whole, parts = form.encode(source), [form.encode(source.rows(0, 4)), form.encode(source.rows(4, 6))]
    for name, array in whole.items():
        joined = np.concatenate([part[name] for part in parts], form.rows_axis(name))
        assert np.array_equal(joined, array)


halves = st.builds(math.ldexp, st.integers(-1023, 1023), st.integers(-24, -14))


@st.composite
def small_blocks(draw: st.DrawFn) -> Blocks:
    """One row of one to three blocks of float16 scales and minimums below 1/16, scale 0 among them."""
    count = draw(st.integers(1, 3))
    codes = draw(st.binary(min_size=32 * count, max_size=32 * count))
    lists = st.lists(halves, min_size=count, max_size=count)
    return Blocks(
        4,
        np.frombuffer(codes, np.uint8).reshape(1, count, 32) & np.uint8(15),
        np.array([draw(lists)], np.float32),
        np.array([draw(lists)], np.float32),
    )


class TestFloats:
    def test_rounding_to_float16_is_bounded_by_half_a_place(self) -> None:
        source = Plain(np.array([[1 + 2**-11, 2.0**-25 * 1.5, -(2.0**-26), 65504, 0]], np.float32))
        form = DenseFloat(FLOAT16, exact=False)
        bound = form.bound(source, form.encode(source))
        assert bound[0].tolist() == [2**-11 * (1 + 2**-11), 2.0**-25, 2.0**-25, 65504 * 2**-11, 2.0**-25]
        assert (errors_of(form, source) <= bound).all()

    @pytest.mark.parametrize("exact", [True, False])
    def test_weights_beyond_float16_are_refused(self, exact: bool) -> None:
        with pytest.raises(ValueError, match="weights outside float16's range"):
            DenseFloat(FLOAT16, exact).encode(Plain(np.array([[65536.0]], np.float32)))

    def test_an_exact_form_refuses_to_round(self) -> None:
        assert DenseFloat(FLOAT16).encode(Plain(np.array([[1.5]], np.float32)))["weight"].item() == 1.5
        with pytest.raises(ValueError, match="weights that float16 would round"):
            DenseFloat(FLOAT16).encode(Plain(np.array([[1 + 2**-11]], np.float32)))

    def test_floats_that_stay_float32_are_not_copied(self) -> None:
        source = plain()
        assert DenseFloat(FLOAT32).encode(source)["weight"] is source.weights


class TestSymmetric:
    def test_blocks_with_another_middle_are_refused(self) -> None:
        with pytest.raises(ValueError, match="not symmetric"):
            Symmetric(4, 32, FLOAT32).encode(q4_1())

    @pytest.mark.parametrize("source", [symmetric(8, 32), symmetric(4, 16)])
    def test_blocks_of_another_size_are_refused(self, source: Blocks) -> None:
        with pytest.raises(ValueError, match=r"its blocks are \d+ codes of \d bits, not 32 of 4"):
            Symmetric(4, 32, FLOAT32).encode(source)

    def test_floats_are_not_quantised_by_an_exact_form(self) -> None:
        with pytest.raises(ValueError, match="without rounding cannot be made of Plain numbers"):
            Symmetric(8, 32, FLOAT32).encode(plain())

    def test_scales_that_are_products_are_rounded_to_float16_only_where_that_is_said(self) -> None:
        with pytest.raises(ValueError, match="scales that float16 would round"):
            Symmetric(8, 16, FLOAT16).encode(q6_k())
        assert errors_of(Symmetric(8, 16, FLOAT16, exact=False), q6_k()).any()

    def test_what_float16_holds_has_no_room_for_an_error(self) -> None:
        form = Symmetric(8, 32, FLOAT16, exact=False)
        assert not form.bound(Q8_0, form.encode(Q8_0)).any()

    def test_codes_of_six_bits_keep_their_distance_from_the_middle(self) -> None:
        source = q6_k()
        codes = Symmetric(8, 16, FLOAT32).encode(source)["codes"].astype(int) - 128
        assert np.array_equal(codes, source.codes.astype(int) - 32)

    def test_rows_that_end_inside_a_block_are_refused(self) -> None:
        for form in (Symmetric(8, 32, FLOAT32, exact=False), Corrected(4, 32, FLOAT32), ZeroPointed(4, 32, FLOAT32)):
            with pytest.raises(ValueError, match="rows of 100 weights"):
                form.stored(4, 100)
        with pytest.raises(ValueError, match="rows of 100 weights"):
            Symmetric(8, 32, FLOAT32, exact=False).encode(plain(columns=100))


class TestCorrected:
    @given(small_blocks())
    def test_below_one_nothing_is_rounded(self, source: Blocks) -> None:
        form = Corrected(4, 32, FLOAT32)
        assert not errors_of(form, source).any()
        assert not form.bound(source, form.encode(source)).any()

    def test_a_correction_that_float32_cannot_hold_is_bounded(self) -> None:
        scales, minimums = np.full((1, 1), 2.0**-24, np.float32), np.full((1, 1), 8, np.float32)
        source = Blocks(4, np.zeros((1, 1, 32), np.uint8), scales, minimums)
        form = Corrected(4, 32, FLOAT32)
        error, bound = errors_of(form, source).max(), form.bound(source, form.encode(source)).max()
        assert 0 < error <= bound <= 2.0**-24 * 8.01

    def test_a_block_of_scale_zero_is_its_minimum(self) -> None:
        codes, zero, minimum = np.full((1, 1, 32), 9, np.uint8), np.zeros((1, 1)), np.full((1, 1), -0.25)
        source = Blocks(4, codes, zero.astype(np.float32), minimum.astype(np.float32))
        for form in (Corrected(4, 32, FLOAT32), ZeroPointed(4, 32, FLOAT32)):
            arrays = form.encode(source)
            assert (form.decode(arrays) == -0.25).all()
            assert all(np.isfinite(array).all() for array in arrays.values())

    def test_floats_are_refused(self) -> None:
        for form in (Corrected(4, 32, FLOAT32), ZeroPointed(4, 32, FLOAT32)):
            with pytest.raises(ValueError, match="cannot be made of Plain numbers"):
                form.encode(plain())


class TestZeroPointed:
    @given(small_blocks())
    def test_a_rounded_zero_point_costs_a_few_places(self, source: Blocks) -> None:
        form = ZeroPointed(4, 32, FLOAT32)
        assert (errors_of(form, source) <= form.bound(source, form.encode(source))).all()


class TestAgainstTheOperators:
    """An identity matrix multiplied by the weights shows them as ONNX Runtime unpacks them."""

    @pytest.mark.parametrize("floats", [FLOAT32, FLOAT16])
    @pytest.mark.parametrize("source", [Q4_0, Q8_0, q6_k()], ids=["Q4_0", "Q8_0", "Q6_K"])
    def test_mat_mul_n_bits_sees_the_same_weights(self, source: Blocks, floats: np.dtype[Any]) -> None:
        form = Symmetric(4 if source.bits == 4 else 8, source.codes.shape[-1], floats, exact=False)
        found = products(form, source, np.eye(source.to_doubles().shape[1], dtype=floats))
        expected = form.decode(form.encode(source)).astype(floats)
        assert np.allclose(found.T, expected, rtol=2e-3 if floats == FLOAT16 else 0, atol=0)

    @pytest.mark.parametrize("block", [16, 32])
    def test_mat_mul_n_bits_rounds_activations_to_8_bits_for_either_block(self, block: int) -> None:
        source = symmetric(8, block)
        x = np.random.default_rng(1).normal(size=(5, 96)).astype(np.float32)
        expected = x @ source.to_doubles().T
        error = products(Symmetric(8, block, FLOAT32), source, x, accuracy_level=4) - expected
        assert 0 < np.sqrt((error**2).mean() / (expected**2).mean()) < 0.01

    def test_mat_mul_n_bits_sees_the_zero_points(self) -> None:
        form, source = ZeroPointed(4, 32, FLOAT32), q4_1()
        found = products(form, source, np.eye(96, dtype=np.float32), "w.codes", "w.scales", "w.zero_points")
        assert (np.abs(found.T - source.to_doubles()) <= form.bound(source, form.encode(source))).all()

    def test_fused_mat_mul_reads_rows_as_they_lie(self) -> None:
        form, source = DenseFloat(FLOAT32), plain()
        weights = initialisers("w", form, form.encode(source), 6, 96)
        x = np.eye(96, dtype=np.float32)
        found = run_node("FusedMatMul", ["x", "w.weight"], weights, {"x": x}, transB=1)
        assert np.array_equal(found.T, source.weights)

    @pytest.mark.parametrize("floats", [FLOAT32, FLOAT16])
    @pytest.mark.parametrize("source", [Q4_0, Q8_0, q6_k()], ids=["Q4_0", "Q8_0", "Q6_K"])
    def test_gather_block_quantized_sees_the_same_rows(self, source: Blocks, floats: np.dtype[Any]) -> None:
        form = Symmetric(4 if source.bits == 4 else 8, source.codes.shape[-1], floats, exact=False)
        arrays = form.encode(source)
        columns = source.to_doubles().shape[1]
        codes, scales = initialisers("w", form, arrays, 6, columns)
        codes.dims[:] = [6, columns * form.bits // 8]
        found = run_node(
            "GatherBlockQuantized",
            ["w.codes", "ids", "w.scales"],
            [codes, scales],
            {"ids": np.array([5, 0, 3])},
            bits=form.bits,
            block_size=form.block,
            gather_axis=0,
            quantize_axis=1,
        )
        assert np.array_equal(found, form.decode(arrays)[[5, 0, 3]].astype(floats))


def products(
    form: Symmetric | ZeroPointed,
    source: Values,
    x: Floats,
    *inputs: str,
    accuracy_level: int = 0,
) -> Floats:
    """MatMulNBits of x and a source's weights."""
    rows, columns = source.to_doubles().shape
    return run_node(
        "MatMulNBits",
        ["x", *(inputs or ("w.codes", "w.scales"))],
        initialisers("w", form, form.encode(source), rows, columns),
        {"x": x},
        N=rows,
        K=columns,
        bits=form.bits,
        block_size=form.block,
        accuracy_level=accuracy_level,
    )
