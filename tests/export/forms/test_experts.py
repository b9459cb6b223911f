from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.capi import _pybind_state

from export.forms.experts import ExpertBits, ExpertFloat, ExpertFp4, ExpertMxfp4
from export.forms.form import FLOAT8E8M0, Form
from export.forms.values import MXFP4_VALUES, Doubles, Mxfp4, Values
from tests.export.numbers import FLOAT16, FLOAT32, mxfp4, plain, symmetric
from tests.export.one_node import Array, initialiser, initialisers, open_node, run_node

FORMS: list[Form] = [
    ExpertFloat(FLOAT32),
    ExpertFloat(FLOAT16),
    ExpertBits(8, 32, FLOAT32),
    ExpertBits(8, 32, FLOAT16),
    ExpertBits(4, 32, FLOAT32),
    ExpertBits(4, 32, FLOAT16),
    ExpertFp4(),
    ExpertMxfp4(),
]
forms = pytest.mark.parametrize("form", FORMS, ids=repr)


def one_block(exponent: int, byte: int = 0x71) -> Mxfp4:
    """32 weights under one exponent: 0.5 and 6, unless other codes are given."""
    return Mxfp4(np.full((1, 1, 16), byte, np.uint8), np.full((1, 1), exponent, np.uint8))


def normal_mxfp4(rows: int = 64, columns: int = 960, size: float = 0.02) -> Mxfp4:
    """What an MX quantiser makes of normal weights: the largest of a block between 4 and 8 steps, nearest codes."""
    blocks = np.random.default_rng(0).normal(0, size, (rows, columns // 32, 32))
    powers = np.floor(np.log2(np.abs(blocks).max(axis=-1))) - 2
    sizes = np.abs(blocks) / 2.0 ** powers[..., None]
    codes = np.abs(sizes[..., None] - MXFP4_VALUES[:8]).argmin(axis=-1) | np.where(blocks < 0, 8, 0)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    return Mxfp4(packed, (powers + 127).astype(np.uint8))


@forms
def test_a_form_stores_what_it_says_beforehand(form: Form) -> None:
    arrays, stored = form.encode(mxfp4()), form.stored(6, 96)
    assert list(arrays) == list(stored)
    for name, array in arrays.items():
        assert (array.shape, array.dtype) == (stored[name].shape, stored[name].dtype)


@forms
def test_no_weight_is_farther_away_than_the_bound(form: Form) -> None:
    for source in (mxfp4(), normal_mxfp4()):
        arrays = form.encode(source)
        errors = np.abs(form.decode(arrays) - source.to_doubles())
        assert (errors <= form.bound(source, arrays)).all()
        assert not form.exact or not errors.any()


@forms
def test_slices_of_rows_joined_are_the_whole(form: Form) -> None:
    source = mxfp4(rows=600)
    whole, parts = form.encode(source), [form.encode(source.rows(0, 514)), form.encode(source.rows(514, 600))]
    for name, array in whole.items():
        joined = np.concatenate([part[name] for part in parts], form.rows_axis(name))
        assert np.array_equal(joined, array)


@forms
def test_experts_of_other_numbers_are_refused(form: Form) -> None:
    others: list[Values] = [plain(), symmetric(4, 32)]
    for source in others:
        with pytest.raises(ValueError, match="experts are made of MXFP4"):
            form.encode(source)


@pytest.mark.parametrize("form", [ExpertBits(8, 32, FLOAT32), ExpertFp4(), ExpertMxfp4()], ids=repr)
def test_rows_that_end_inside_a_block_are_refused(form: Form) -> None:
    with pytest.raises(ValueError, match="rows of 100 weights"):
        form.stored(4, 100)


class TestScales:
    """For which exponents a float type holds scales and weights."""

    @pytest.mark.parametrize(("floats", "first", "last"), [(FLOAT32, 2, 252), (FLOAT16, 104, 140)])
    @pytest.mark.parametrize("bits", [0, 4, 8])
    def test_exponents_up_to_the_limits_are_kept_and_others_refused(
        self, bits: int, floats: np.dtype[Any], first: int, last: int
    ) -> None:
        form: Form = ExpertBits(bits, 32, floats) if bits else ExpertFloat(floats)
        for exponent in (first, last):
            source = one_block(exponent)
            arrays = form.encode(source)
            assert all(np.isfinite(array).all() for array in arrays.values())
            errors = np.abs(form.decode(arrays) - source.to_doubles())
            assert (errors <= form.bound(source, arrays)).all()
        for exponent in (first - 1, last + 1, 255):
            with pytest.raises(ValueError, match=f"it has scales outside {floats}'s range"):
                form.encode(one_block(exponent))

    def test_at_the_limits_no_float32_weight_is_a_denormal_or_infinite(self) -> None:
        """ONNX Runtime is told to take denormals for zero."""
        weights = [ExpertFloat(FLOAT32).encode(one_block(exponent))["weight"] for exponent in (2, 252)]
        scales = [ExpertBits(8, 32, FLOAT32).encode(one_block(exponent))["scales"] for exponent in (2, 252)]
        for numbers in (*weights, *scales):
            assert (np.abs(numbers) >= np.finfo(np.float32).smallest_normal).all()
            assert np.isfinite(numbers).all()

    @pytest.mark.parametrize("byte", [0x00, 0x88, 0x80])
    def test_a_block_of_zeros_may_have_any_exponent(self, byte: int) -> None:
        for form in (ExpertBits(8, 32, FLOAT16), ExpertBits(4, 32, FLOAT16), ExpertFloat(FLOAT16)):
            for exponent in (0, 254):
                assert not form.decode(form.encode(one_block(exponent, byte))).any()

    def test_the_others_keep_every_exponent(self) -> None:
        every = Mxfp4(np.full((2, 128, 16), 0x7F, np.uint8), np.arange(256, dtype=np.uint8).reshape(2, 128))
        for form in (ExpertFp4(), ExpertMxfp4()):
            assert np.array_equal(form.encode(every)["scales"], every.exponents)


class TestEightBits:
    def test_a_code_is_twice_the_value(self) -> None:
        source = Mxfp4(np.arange(256, dtype=np.uint8).reshape(16, 1, 16), np.full((16, 1), 127, np.uint8))
        arrays = ExpertBits(8, 32, FLOAT32).encode(source)
        assert (arrays["scales"] == 0.5).all()
        for row, byte in np.ndindex(16, 16):
            low, high = MXFP4_VALUES[byte], MXFP4_VALUES[row]
            assert arrays["codes"][row, 2 * byte : 2 * byte + 2].tolist() == [2 * low + 128, 2 * high + 128]

    def test_float16_scales_are_as_exact_as_float32_ones(self) -> None:
        half, full = (ExpertBits(8, 32, floats).encode(mxfp4())["scales"] for floats in (FLOAT16, FLOAT32))
        assert np.array_equal(half, full)


class TestFourBits:
    def test_the_error_on_normal_weights_is_what_the_module_says(self) -> None:
        form, found = ExpertBits(4, 32, FLOAT16), []
        for eighth in range(8):  # of an octave: how large weights are in their blocks' powers of two
            source = normal_mxfp4(size=0.02 * 2 ** (eighth / 8))
            weights = source.to_doubles()
            errors = form.decode(form.encode(source)) - weights
            found.append(np.sqrt((errors**2).sum() / (weights**2).sum()))
        assert np.mean(found) == pytest.approx(0.070, abs=0.001)

    @pytest.mark.parametrize("source", [mxfp4(rows=70), normal_mxfp4(rows=4)], ids=["any", "normal"])
    def test_each_block_takes_the_best_of_three_steps(self, source: Mxfp4) -> None:
        form = ExpertBits(4, 32, FLOAT32)
        blocks = source.to_doubles().reshape(-1, 32)
        found = ((form.decode(form.encode(source)).reshape(-1, 32) - blocks) ** 2).sum(axis=-1)
        # Of equally large weights the negative one counts.
        extremes = np.where(-blocks.min(axis=-1) >= blocks.max(axis=-1), blocks.min(axis=-1), blocks.max(axis=-1))
        best = np.min([squared_errors(blocks, extremes / divisor) for divisor in (-8, -7, -6)], axis=0)
        assert np.allclose(found, best, rtol=1e-2, atol=0)

    def test_elements_lie_in_the_same_nibbles_as_in_mxfp4(self) -> None:
        source, form = Mxfp4(np.zeros((1, 1, 16), np.uint8), np.full((1, 1), 127, np.uint8)), ExpertBits(4, 32, FLOAT32)
        source.packed[0, 0, 3] = 0x0F
        arrays = form.encode(source)
        assert arrays["codes"][0, 3] >> 4 == 8
        assert np.flatnonzero(form.decode(arrays)[0]).tolist() == [6]
        assert form.decode(arrays)[0, 6] == -6


def squared_errors(blocks: Doubles, steps: Doubles) -> Doubles:
    """Of each block, quantised with codes -8 to 7."""
    codes = np.clip(np.rint(blocks / np.where(steps == 0, 1, steps)[:, None]), -8, 7)
    errors: Doubles = ((codes * steps[:, None] - blocks) ** 2).sum(axis=-1)
    return errors


class TestFp4:
    def test_a_code_moves_to_its_transposed_place(self) -> None:
        source = mxfp4(rows=10, columns=64)
        codes = ExpertFp4().encode(source)["codes"]
        for row, column in np.ndindex(10, 64):
            byte = source.packed[row, column // 32, column % 32 // 2]
            expected = byte >> 4 if column % 2 else byte & 15
            transposed = codes[column, row // 2]
            assert (transposed >> 4 if row % 2 else transposed & 15) == expected

    @pytest.mark.parametrize(("rows", "columns"), [(128, 64), (576, 160), (1024, 288)])
    def test_codes_are_those_of_onnx_runtimes_own_packer(self, rows: int, columns: int) -> None:
        source = mxfp4(rows, columns)
        packed = _pybind_state.pack_fp4_weights_for_cuda_moe_gemm(source.packed.reshape(rows, -1), rows, columns)
        ours = ExpertFp4().encode(source)["codes"]
        assert np.array_equal(ours.reshape(-1), np.asarray(packed).view(np.uint8).reshape(-1))

    def test_scales_have_onnxs_type_for_powers_of_two(self) -> None:
        assert onnx.TensorProto.FLOAT8E8M0 == FLOAT8E8M0
        assert ExpertFp4().stored(6, 96)["scales"].tensor_type == FLOAT8E8M0

    def test_an_odd_row_has_no_partner(self) -> None:
        with pytest.raises(ValueError, match="5 rows"):
            ExpertFp4().stored(5, 96)
        with pytest.raises(ValueError, match="1 rows"):
            ExpertFp4().encode(one_block(124))

    def test_onnx_runtime_takes_types_and_shapes_and_lacks_nothing_but_a_cpu_kernel(self) -> None:
        layers = [mixture_layer(ExpertFp4(), name, rows, columns) for name, rows, columns in LAYERS]
        ones = initialiser("ones", np.ones(EXPERTS, np.float32), onnx.TensorProto.FLOAT)
        inputs = ["x", "scores", "up.codes", "up.scales", "", "down.codes", "down.scales", *[""] * 8, "ones", "ones"]
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented, match="QMoE"):
            open_node("QMoE", inputs, [*layers[0], *layers[1], ones], feeds(FLOAT16), quant_type="fp4", **MIXTURE)

    def test_codes_of_an_unknown_type_are_refused_in_another_way(self) -> None:
        wrong = [initialiser("up.codes", np.zeros((2, 3), np.uint8), onnx.TensorProto.DOUBLE)]
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph):
            open_node("QMoE", ["x", "scores", "up.codes"], wrong, feeds(FLOAT16), quant_type="fp4", **MIXTURE)


class TestMxfp4:
    def test_nothing_is_copied(self) -> None:
        source = mxfp4()
        arrays = ExpertMxfp4().encode(source)
        assert arrays["codes"] is source.packed
        assert arrays["scales"] is source.exponents


EXPERTS, HIDDEN, INNER = 3, 64, 96
LAYERS = (("up", INNER, HIDDEN), ("down", HIDDEN, INNER))
MIXTURE: dict[str, Any] = {
    "k": 1,
    "activation_type": "identity",
    "normalize_routing_weights": 1,
    "block_size": 32,
    "expert_weight_bits": 4,
}


def mixture_source(name: str, expert: int) -> Mxfp4:
    rows, columns = next((rows, columns) for layer, rows, columns in LAYERS if layer == name)
    return mxfp4(rows, columns, seed=10 * expert + len(name))


def mixture_layer(form: Form, name: str, rows: int, columns: int) -> list[onnx.TensorProto]:
    """The experts' arrays stacked."""
    encoded = [form.encode(mixture_source(name, expert)) for expert in range(EXPERTS)]
    stacked = {array: np.stack([one[array] for one in encoded]) for array in encoded[0]}
    return initialisers(name, form, stacked, rows, columns)


def feeds(floats: np.dtype[Any]) -> dict[str, Array]:
    """Every unit vector once for every expert, which is chosen alone."""
    x = np.tile(np.eye(HIDDEN), (EXPERTS, 1))
    scores = np.repeat(np.eye(EXPERTS) * 40, HIDDEN, axis=0)
    return {"x": x.astype(floats), "scores": scores.astype(floats)}


class TestAgainstTheOperators:
    """Unit vectors through two layers without an activation show the product of their weights."""

    @pytest.mark.parametrize("floats", [FLOAT32, FLOAT16])
    @pytest.mark.parametrize("bits", [8, 4])
    def test_qmoe_sees_the_same_weights(self, bits: int, floats: np.dtype[Any]) -> None:
        """Scales may be float16 under float32 activations. In 8 bits the kernel rounds activations to 8 bits."""
        form = ExpertBits(bits, 32, floats)
        weights = [tensor for name, rows, columns in LAYERS for tensor in mixture_layer(form, name, rows, columns)]
        inputs = ["x", "scores", "up.codes", "up.scales", "", "down.codes", "down.scales"]
        found = run_node("QMoE", inputs, weights, feeds(FLOAT32), **(MIXTURE | {"expert_weight_bits": bits}))
        assert relative_error(found, form) < (0.02 if bits == 8 else 1e-6)

    def test_moe_sees_the_same_weights(self) -> None:
        form = ExpertFloat(FLOAT32)
        weights = [tensor for name, rows, columns in LAYERS for tensor in mixture_layer(form, name, rows, columns)]
        attributes = {name: MIXTURE[name] for name in ("k", "activation_type", "normalize_routing_weights")}
        found = run_node("MoE", ["x", "scores", "up.weight", "", "down.weight"], weights, feeds(FLOAT32), **attributes)
        assert relative_error(found, form) < 1e-6


def relative_error(found: Array, form: Form) -> float:
    """Of the products of two layers, expert by expert."""
    expected = []
    for expert in range(EXPERTS):
        up, down = (form.decode(form.encode(mixture_source(name, expert))) for name, _, _ in LAYERS)
        expected.append((down @ up).T)
    products = np.concatenate(expected)
    return float(np.sqrt(((found - products) ** 2).sum() / (products**2).sum()))
