"""Forms of the matrices that every token is multiplied with, and of the embedding table.

Operators `MatMulNBits` and `GatherBlockQuantized` of com.microsoft take codes in row-major order, 4-bit codes two a
byte (`export/forms/codes.py`), and with no zero point compute (code - half) * scale, half = 2**(bits-1):

DenseFloat    w                                    row-major as in the checkpoint: FusedMatMul(transB=1), Gather.
Symmetric     w = (code - half) * scale            sources that are symmetric themselves, and quantised floats.
Corrected     w = (code - half) * scale + c        c = minimum + half * scale, one a block: the product with c is a
              small float MatMul over the blocks' sums of x. Served. GGUF's scales and minimums are multiples of 2**-24,
              so c is exact in float32 when |c| < 1.
ZeroPointed   w = (code - z) * scale               z = -minimum / scale, rounded. The oracle in tests.

Does not know files, tensor names or graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.forms.codes import count_blocks, pack_codes, signed_products, unpack_codes
from export.forms.form import Arrays, Stored
from export.forms.quantize import farthest, quantize
from export.forms.values import Blocks, Bytes, Doubles, Plain, Values

_NOTHING: Doubles = np.zeros(())


@dataclass(frozen=True)
class DenseFloat:
    """weight [rows, columns]; exact: values that `floats` cannot hold are refused, otherwise rounded."""

    floats: np.dtype[Any]
    exact: bool = True

    @property
    def label(self) -> str:
        return str(self.floats)

    def stored(self, rows: int, columns: int) -> dict[str, Stored]:
        return {"weight": Stored.of((rows, columns), self.floats)}

    def rows_axis(self, array: str) -> int:
        return 0

    def encode(self, values: Values) -> dict[str, NDArray[Any]]:
        numbers = values.weights if isinstance(values, Plain) else values.to_doubles()
        return {"weight": _narrow(numbers, self.floats, self.exact, "weights")}

    def decode(self, arrays: Arrays) -> Doubles:
        return arrays["weight"].astype(np.float64)

    def bound(self, values: Values, arrays: Arrays) -> Doubles:
        """Half of the last place."""
        return _NOTHING if self.exact else _half_place(values.to_doubles(), self.floats)


@dataclass(frozen=True)
class Symmetric:
    """codes uint8 [rows, blocks, block * bits / 8]; scales [rows, blocks].

    exact: takes blocks that are symmetric themselves and whose scales `floats` holds. Otherwise it also quantises
    floats, and rounds scales.
    """

    bits: int
    block: int
    floats: np.dtype[Any]
    exact: bool = True

    @property
    def label(self) -> str:
        return f"{self.bits}-bit blocks of {self.block}"

    def stored(self, rows: int, columns: int) -> dict[str, Stored]:
        blocks = count_blocks(columns, self.block)
        return {
            "codes": Stored.of((rows, blocks, self.block * self.bits // 8), np.dtype(np.uint8)),
            "scales": Stored.of((rows, blocks), self.floats),
        }

    def rows_axis(self, array: str) -> int:
        return 0

    def encode(self, values: Values) -> dict[str, NDArray[Any]]:
        match values:
            case Plain(weights=weights) if not self.exact:
                count_blocks(weights.shape[1], self.block)
                codes, scales = quantize(weights, self.bits, self.block, self.floats)
                return {"codes": pack_codes(codes, self.bits), "scales": scales}
            case Blocks():
                if (_corrections(values) != 0).any():
                    raise ValueError("its blocks are not symmetric")
                return _codes_and_scales(values, self.bits, self.block, self.floats, self.exact)
            case _:
                raise ValueError(f"{self.label} without rounding cannot be made of {type(values).__name__} numbers")

    def decode(self, arrays: Arrays) -> Doubles:
        return signed_products(arrays["codes"], arrays["scales"], self.bits).reshape(len(arrays["codes"]), -1)

    def bound(self, values: Values, arrays: Arrays) -> Doubles:
        """Quantised floats: see `export/forms/quantize.py`. Blocks whose scales are rounded: half of a scale's last
        place times the signed code."""
        if self.exact:
            return _NOTHING
        match values:
            case Blocks():
                bound = _scale_rounding(values, self.floats)
            case _:
                weights = values.to_doubles().reshape(*arrays["scales"].shape, self.block)
                bound = farthest(weights, arrays["scales"], self.bits)
        return bound.reshape(len(values), -1)


@dataclass(frozen=True)
class Corrected:
    """codes and scales as in Symmetric; corrections float32 [blocks, rows], a MatMul's right-hand side.

    Not called exact, for there are scales and minimums whose correction no float32 holds; `bound` is 0 where one does.
    """

    bits: int
    block: int
    floats: np.dtype[Any]

    @property
    def label(self) -> str:
        return f"{self.bits}-bit blocks of {self.block} with corrections"

    @property
    def exact(self) -> bool:
        return False

    def stored(self, rows: int, columns: int) -> dict[str, Stored]:
        codes_and_scales = Symmetric(self.bits, self.block, self.floats).stored(rows, columns)
        blocks = columns // self.block
        return codes_and_scales | {"corrections": Stored.of((blocks, rows), np.dtype(np.float32))}

    def rows_axis(self, array: str) -> int:
        return 1 if array == "corrections" else 0

    def encode(self, values: Values) -> dict[str, NDArray[Any]]:
        blocks = _expect_blocks(values, self.label)
        arrays = _codes_and_scales(blocks, self.bits, self.block, self.floats, exact=False)
        return arrays | {"corrections": np.ascontiguousarray(_corrections(blocks).T, dtype=np.float32)}

    def decode(self, arrays: Arrays) -> Doubles:
        weights = signed_products(arrays["codes"], arrays["scales"], self.bits)
        weights += arrays["corrections"].T.astype(np.float64)[..., None]
        return weights.reshape(len(arrays["codes"]), -1)

    def bound(self, values: Values, arrays: Arrays) -> Doubles:
        """Half of the last place of a correction that float32 does not hold, and of a scale times the signed code."""
        blocks = _expect_blocks(values, self.label)
        corrections = _corrections(blocks)
        rounded = corrections.astype(np.float32) != corrections
        bound = np.where(rounded, _half_place(corrections, np.dtype(np.float32)), 0.0)[..., None]
        return (bound + _scale_rounding(blocks, self.floats)).reshape(len(blocks), -1)


@dataclass(frozen=True)
class ZeroPointed:
    """codes and scales as in Symmetric; zero_points [rows, blocks]. A block of scale 0 is (1 - 0) * minimum."""

    bits: int
    block: int
    floats: np.dtype[Any]

    @property
    def label(self) -> str:
        return f"{self.bits}-bit blocks of {self.block} with zero points"

    @property
    def exact(self) -> bool:
        return False

    def stored(self, rows: int, columns: int) -> dict[str, Stored]:
        codes_and_scales = Symmetric(self.bits, self.block, self.floats).stored(rows, columns)
        return codes_and_scales | {"zero_points": codes_and_scales["scales"]}

    def rows_axis(self, array: str) -> int:
        return 0

    def encode(self, values: Values) -> dict[str, NDArray[Any]]:
        blocks = _expect_blocks(values, self.label)
        constant = blocks.scales == 0
        filled = Blocks(
            blocks.bits,
            np.where(constant[..., None], np.uint8(1), blocks.codes),
            np.where(constant, blocks.minimums, blocks.scales),
            np.where(constant, np.float32(0), blocks.minimums),
        )
        if filled.bits != self.bits:
            raise ValueError(f"its codes have {filled.bits} bits, not {self.bits}")
        arrays = _codes_and_scales(filled, self.bits, self.block, self.floats, exact=True)
        steps = np.where(filled.scales == 0, 1, filled.scales)
        return arrays | {"zero_points": _narrow(-filled.minimums / steps, self.floats, False, "zero points")}

    def decode(self, arrays: Arrays) -> Doubles:
        """Rounded after every operation, as in a kernel; which has an order of its own, within the same bound."""
        codes = unpack_codes(arrays["codes"], self.bits).astype(self.floats)
        weights = (codes - arrays["zero_points"][..., None]) * arrays["scales"][..., None]
        return weights.reshape(len(codes), -1).astype(np.float64)

    def bound(self, values: Values, arrays: Arrays) -> Doubles:
        """One rounding each of the zero point, of the difference and of the product."""
        blocks = _expect_blocks(values, self.label)
        minimums = np.abs(blocks.minimums.astype(np.float64))[..., None]
        products = blocks.codes * np.abs(blocks.scales.astype(np.float64))[..., None]
        bound: Doubles = float(np.finfo(self.floats).eps) * (products + 2 * minimums)
        return bound.reshape(len(blocks), -1)


def _expect_blocks(values: Values, label: str) -> Blocks:
    if not isinstance(values, Blocks):
        raise ValueError(f"{label} cannot be made of {type(values).__name__} numbers")
    return values


def _codes_and_scales(
    blocks: Blocks, bits: int, block: int, floats: np.dtype[Any], exact: bool
) -> dict[str, NDArray[Any]]:
    """The source's own, codes shifted so that their half is the operator's."""
    if blocks.bits > bits or blocks.codes.shape[-1] != block:
        raise ValueError(f"its blocks are {blocks.codes.shape[-1]} codes of {blocks.bits} bits, not {block} of {bits}")
    codes: Bytes = blocks.codes
    if blocks.bits < bits:
        codes = codes + np.uint8((1 << (bits - 1)) - blocks.half)
    return {"codes": pack_codes(codes, bits), "scales": _narrow(blocks.scales, floats, exact, "scales")}


def _corrections(blocks: Blocks) -> Doubles:
    """minimum + half * scale [rows, blocks], unrounded: what a symmetric kernel leaves out."""
    corrections: Doubles = blocks.scales.astype(np.float64)
    corrections *= blocks.half
    corrections += blocks.minimums
    return corrections


def _scale_rounding(blocks: Blocks, floats: np.dtype[Any]) -> Doubles:
    """What rounding a scale does to each weight [rows, blocks, block]."""
    scales = blocks.scales.astype(np.float64)
    rounded = scales.astype(floats) != scales
    places = np.where(rounded, _half_place(scales, floats), 0.0)
    signed: Doubles = np.abs(blocks.codes.astype(np.float64) - blocks.half)
    return signed * places[..., None]


def _half_place(numbers: Doubles, floats: np.dtype[Any]) -> Doubles:
    """At most half the distance between a number's neighbours in `floats`."""
    info = np.finfo(floats)
    place: Doubles = np.maximum(np.abs(numbers) * (float(info.eps) / 2), float(info.smallest_subnormal) / 2)
    return place


def _narrow(numbers: NDArray[Any], floats: np.dtype[Any], exact: bool, what: str) -> NDArray[Any]:
    """Numbers as `floats`; raises ValueError for those beyond its range and, if exact, for those it would round."""
    with np.errstate(over="ignore"):
        narrowed = numbers.astype(floats, copy=False)
    if not np.isfinite(narrowed).all():
        raise ValueError(f"it has {what} outside {floats}'s range")
    if exact and narrowed is not numbers and (narrowed != numbers).any():
        raise ValueError(f"it has {what} that {floats} would round")
    return narrowed
