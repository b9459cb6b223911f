"""How near a written matrix is to its source, weight by weight.

In general by numbers: the source's `to_doubles` against the form's `decode`, in float64, which holds both without
rounding. Neither shares a line with `encode`, so that a swapped nibble or a wrong scale shows.

A full model has 19e9 expert weights, for which that takes too long. Where a form is exact, equal numbers follow from
equal codes and scales, and those are compared first, each against what the formats' definitions ask for and not
against what `encode` does again:

Symmetric, Corrected   the written codes, unpacked, are the source's; so are the scales; what is left of the minimums
                       is the correction (in float64).
ExpertBits, 8 bits     a table of all 256 bytes, made of the numbers that `Mxfp4` says they stand for.
ExpertFp4              each nibble [column, row] of the transpose against the nibble [row, column] of the source.
ExpertMxfp4            the same bytes.

Only if that finds a difference, the numbers decide. Does not know files or names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.forms.codes import unpack_codes
from export.forms.experts import ExpertBits, ExpertFp4, ExpertMxfp4
from export.forms.form import Arrays, Form
from export.forms.matrix import Corrected, DenseFloat, Symmetric
from export.forms.mxfp4 import look_up
from export.forms.values import MXFP4_BIAS, MXFP4_BLOCK, Blocks, Doubles, Mxfp4, Plain, Values

_PIECE_WEIGHTS = 1 << 15
"""Compared at a time as numbers: a few arrays of float64 in a core's cache."""
_PIECE_ROWS = 256


@dataclass(frozen=True)
class Fidelity:
    """What was found about a number of weights stored in a form (its label).

    broken: farther from the source than the form promises. max_error: the largest distance. The sums are over weights
    that were compared as numbers; those with equal codes and scales add nothing to them.
    """

    form: str
    weights: int
    broken: int
    max_error: float
    sum_squared_error: float
    sum_squares: float

    @property
    def exact(self) -> bool:
        """Whether every weight is the source's very number."""
        return self.broken == 0 and self.max_error == 0

    @property
    def relative_rms(self) -> float:
        """Root of the mean squared error, relative to that of the weights that were compared as numbers."""
        if self.sum_squared_error == 0:
            return 0.0
        return sqrt(self.sum_squared_error / self.sum_squares) if self.sum_squares else inf

    def __add__(self, other: Fidelity) -> Fidelity:
        """Both together: slices of one tensor."""
        return Fidelity(
            self.form,
            self.weights + other.weights,
            self.broken + other.broken,
            max(self.max_error, other.max_error),
            self.sum_squared_error + other.sum_squared_error,
            self.sum_squares + other.sum_squares,
        )


def measure(values: Values, arrays: Arrays, form: Form) -> Fidelity:
    """Compare a slice with its source: `arrays` are those of the same rows."""
    columns = values.rows(0, 1).to_doubles().size
    if _has_equal_codes(values, arrays, form):
        return Fidelity(form.label, len(values) * columns, 0, 0.0, 0.0, 0.0)
    rows = max(2, _PIECE_WEIGHTS // columns & ~1)
    found = Fidelity(form.label, 0, 0, 0.0, 0.0, 0.0)
    for piece, of_piece in _pieces(values, arrays, form, rows):
        found += _compare_numbers(piece, of_piece, form)
    return found


def _compare_numbers(values: Values, arrays: Arrays, form: Form) -> Fidelity:
    source = _numbers(values)
    errors = form.decode(arrays)
    errors -= source
    np.abs(errors, out=errors)
    broken = int(np.count_nonzero(~(errors <= form.bound(values, arrays))))  # also those that are no number
    return Fidelity(
        form.label, source.size, broken, float(errors.max(initial=0.0)), _sum_squares(errors), _sum_squares(source)
    )


def _numbers(values: Values) -> Doubles:
    """`to_doubles`, faster for MXFP4: two numbers a look-up."""
    match values:
        case Mxfp4(packed=packed, exponents=exponents):
            numbers = look_up(_NUMBERS_OF_BYTE, packed).view(np.float64)
            numbers *= _POWERS[exponents][..., None]
            return numbers.reshape(len(packed), -1)
        case _:
            return values.to_doubles()


def _sum_squares(numbers: Doubles) -> float:
    """Not by a product of vectors: BLAS would wake its threads for each."""
    flat = numbers.reshape(-1)
    return float(np.einsum("i,i->", flat, flat))


def _pieces(values: Values, arrays: Arrays, form: Form, rows: int) -> Iterator[tuple[Values, Arrays]]:
    """Rows by rows, an even number of them: an array may hold two in a byte."""
    for start in range(0, len(values), rows):
        stop = min(start + rows, len(values))
        parts = {}
        for name, array in arrays.items():
            axis = form.rows_axis(name)
            size = array.shape[axis]
            part = slice(start * size // len(values), stop * size // len(values))
            parts[name] = array[part] if axis == 0 else array[:, part]
        yield values.rows(start, stop), parts


def _has_equal_codes(values: Values, arrays: Arrays, form: Form) -> bool:
    """Whether codes and scales alone show that every weight is equal; False says nothing."""
    match form, values:
        case DenseFloat(), Plain():
            return np.array_equal(arrays["weight"], values.weights)
        case ((Symmetric() | Corrected()), Blocks()):
            return _are_equal_blocks(values, arrays, form)
        case ExpertBits(bits=8), Mxfp4():
            return _are_equal_bits(values, arrays)
        case ExpertFp4(), Mxfp4():
            return np.array_equal(arrays["scales"], values.exponents) and _is_transpose(values, arrays["codes"])
        case ExpertMxfp4(), Mxfp4():
            same_scales = np.array_equal(arrays["scales"], values.exponents)
            return same_scales and np.array_equal(arrays["codes"], values.packed)
        case _:
            return False


def _are_equal_blocks(values: Blocks, arrays: Arrays, form: Symmetric | Corrected) -> bool:
    half = 1 << (form.bits - 1)
    codes = unpack_codes(arrays["codes"], form.bits)
    expected = values.codes if half == values.half else values.codes + np.uint8(half - values.half)
    remainders = values.minimums.astype(np.float64) + values.half * values.scales.astype(np.float64)
    corrections = arrays["corrections"].T if "corrections" in arrays else np.zeros(())
    return (
        np.array_equal(codes, expected)
        and np.array_equal(arrays["scales"], values.scales)
        and bool((remainders == corrections).all())
    )


def _are_equal_bits(values: Mxfp4, arrays: Arrays) -> bool:
    """(code - 128) * scale, where value = (code - 128) / 2 and power of two = 2 * scale."""
    pairs = np.ascontiguousarray(arrays["codes"]).view(np.uint16).reshape(values.packed.shape)
    same_codes = all(
        np.array_equal(look_up(_CODES_OF_BYTE, values.packed[rows]), pairs[rows]) for rows in _rows(len(values))
    )
    return same_codes and np.array_equal(arrays["scales"], _POWERS[values.exponents] / 2)


def _is_transpose(values: Mxfp4, transposed: NDArray[Any]) -> bool:
    packed = values.packed.reshape(len(values), -1)
    for rows in _rows(len(values)):
        nibbles = unpack_codes(packed[rows], 4)
        columns = unpack_codes(transposed[:, rows.start // 2 : rows.stop // 2], 4)
        if not np.array_equal(columns, nibbles.T):
            return False
    return True


def _rows(count: int) -> Iterator[slice]:
    for start in range(0, count, _PIECE_ROWS):
        yield slice(start, min(start + _PIECE_ROWS, count))


def _numbers_of_bytes() -> NDArray[np.complex128]:
    """The two numbers that `Mxfp4` says each byte stands for, times 2**0."""
    every_byte = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], MXFP4_BLOCK // 2, axis=2)
    numbers = Mxfp4(every_byte, np.full((256, 1), MXFP4_BIAS, np.uint8)).to_doubles()
    return np.ascontiguousarray(numbers[:, :2]).view(np.complex128).reshape(256)


_NUMBERS_OF_BYTE = _numbers_of_bytes()
_CODES_OF_BYTE = (2 * _NUMBERS_OF_BYTE.view(np.float64) + 128).astype(np.uint8).view(np.uint16)
_POWERS: Doubles = np.ldexp(1.0, np.arange(256) - MXFP4_BIAS)
