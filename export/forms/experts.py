"""Forms of one expert's matrix; the experts' arrays are stacked along a new first axis.

Operators `MoE` and `QMoE` of com.microsoft, and `MoeMxfp4` of our own domain. Sources: ONNX Runtime's contrib operator
documentation, and its CUDA tests for fp4.

ExpertFloat   weight [rows, columns]                                             MoE
ExpertBits    (code - half) * scale, blocks along a row                          QMoE, expert_weight_bits 8 or 4
ExpertFp4     the published codes, transposed, and scales as they are            QMoE on CUDA, quant_type "fp4"
ExpertMxfp4   the published bytes                                                MoeMxfp4

All but 4-bit ExpertBits are exact: an fp4 value is a multiple of 1/2 and at most 6, so doubled it is an 8-bit code.
Does not know files, tensor names, graphs or how many experts there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.forms import mxfp4
from export.forms.codes import count_blocks, signed_products
from export.forms.form import FLOAT8E8M0, Arrays, Stored
from export.forms.quantize import farthest
from export.forms.values import MXFP4_BIAS, MXFP4_BLOCK, Bytes, Doubles, Floats, Mxfp4, Values

_NOTHING: Doubles = np.zeros(())
_UINT8 = np.dtype(np.uint8)

_EXPONENTS = {np.dtype(np.float32): (2, 252), np.dtype(np.float16): (104, 140)}
"""First and last exponent for which every fp4 value but 0 times 2**(exponent - 127), and half of that power, is a
float32 that is no denormal (ONNX Runtime is told to take those for 0), or a float16 (denormals count there)."""


@dataclass(frozen=True)
class ExpertFloat:
    """weight [rows, columns]."""

    floats: np.dtype[Any]

    @property
    def label(self) -> str:
        return str(self.floats)

    @property
    def exact(self) -> bool:
        return True

    def stored(self, rows: int, columns: int) -> dict[str, Stored]:
        return {"weight": Stored.of((rows, columns), self.floats)}

    def rows_axis(self, array: str) -> int:
        return 0

    def encode(self, values: Values) -> dict[str, NDArray[Any]]:
        source = _expect_mxfp4(values)
        weights = mxfp4.floats(source.packed).reshape(*source.exponents.shape, MXFP4_BLOCK)
        weights *= _powers(source, np.dtype(np.float32), self.floats)[..., None]
        return {"weight": weights.reshape(len(source), -1).astype(self.floats, copy=False)}

    def decode(self, arrays: Arrays) -> Doubles:
        return arrays["weight"].astype(np.float64)

    def bound(self, values: Values, arrays: Arrays) -> Doubles:
        return _NOTHING


@dataclass(frozen=True)
class ExpertBits:
    """codes uint8 [rows, columns * bits / 8]; scales [rows, columns / block]; blocks are those of MXFP4."""

    bits: int
    block: int
    floats: np.dtype[Any]

    @property
    def label(self) -> str:
        return f"{self.bits}-bit blocks of {self.block}"

    @property
    def exact(self) -> bool:
        return self.bits == 8

    def stored(self, rows: int, columns: int) -> dict[str, Stored]:
        return {
            "codes": Stored.of((rows, columns * self.bits // 8), _UINT8),
            "scales": Stored.of((rows, count_blocks(columns, self.block)), self.floats),
        }

    def rows_axis(self, array: str) -> int:
        return 0

    def encode(self, values: Values) -> dict[str, NDArray[Any]]:
        source = _expect_mxfp4(values)
        if self.block != MXFP4_BLOCK:
            raise ValueError(f"MXFP4 has blocks of {MXFP4_BLOCK}, not {self.block}")
        powers = _powers(source, self.floats, self.floats)
        if self.bits == 8:
            return {"codes": mxfp4.doubled(source.packed).reshape(len(source), -1), "scales": powers / 2}
        codes, steps = mxfp4.requantise(source.packed)
        scales = (steps * powers).astype(self.floats, copy=False)
        return {"codes": codes.reshape(len(source), -1), "scales": scales}

    def decode(self, arrays: Arrays) -> Doubles:
        scales = arrays["scales"]
        packed = arrays["codes"].reshape(*scales.shape, self.block * self.bits // 8)
        return signed_products(packed, scales, self.bits).reshape(len(scales), -1)

    def bound(self, values: Values, arrays: Arrays) -> Doubles:
        """Half a step, a whole one beyond the largest code, and what float16 rounds off a small scale, eight times."""
        if self.exact:
            return _NOTHING
        source, scales = _expect_mxfp4(values), arrays["scales"]
        weights = mxfp4.floats(source.packed).reshape(*scales.shape, self.block).astype(np.float64)
        weights *= np.ldexp(1.0, source.exponents.astype(np.int32) - MXFP4_BIAS)[..., None]
        bound = farthest(weights, scales, self.bits)
        bound += (1 << (self.bits - 1)) * float(np.finfo(self.floats).smallest_subnormal)
        return bound.reshape(len(values), -1)


@dataclass(frozen=True)
class ExpertFp4:
    """codes uint8 [columns, rows / 2], even rows in low nibbles; scales FLOAT8E8M0 [rows, columns / 32]."""

    @property
    def label(self) -> str:
        return "MXFP4, transposed"

    @property
    def exact(self) -> bool:
        return True

    def stored(self, rows: int, columns: int) -> dict[str, Stored]:
        return {
            "codes": Stored.of((columns, _count_pairs(rows)), _UINT8),
            "scales": Stored((rows, count_blocks(columns, MXFP4_BLOCK)), _UINT8, FLOAT8E8M0),
        }

    def rows_axis(self, array: str) -> int:
        return 1 if array == "codes" else 0

    def encode(self, values: Values) -> dict[str, NDArray[Any]]:
        source = _expect_mxfp4(values)
        _count_pairs(len(source))
        return {"codes": mxfp4.transpose(source.packed.reshape(len(source), -1)), "scales": source.exponents}

    def decode(self, arrays: Arrays) -> Doubles:
        packed, exponents = mxfp4.transpose(arrays["codes"]), arrays["scales"]
        return Mxfp4(packed.reshape(*exponents.shape, MXFP4_BLOCK // 2), exponents).to_doubles()

    def bound(self, values: Values, arrays: Arrays) -> Doubles:
        return _NOTHING


@dataclass(frozen=True)
class ExpertMxfp4:
    """codes uint8 [rows, columns / 32, 16]; scales uint8 [rows, columns / 32]."""

    @property
    def label(self) -> str:
        return "MXFP4 as published"

    @property
    def exact(self) -> bool:
        return True

    def stored(self, rows: int, columns: int) -> dict[str, Stored]:
        blocks = count_blocks(columns, MXFP4_BLOCK)
        return {
            "codes": Stored.of((rows, blocks, MXFP4_BLOCK // 2), _UINT8),
            "scales": Stored.of((rows, blocks), _UINT8),
        }

    def rows_axis(self, array: str) -> int:
        return 0

    def encode(self, values: Values) -> dict[str, NDArray[Any]]:
        source = _expect_mxfp4(values)
        return {"codes": source.packed, "scales": source.exponents}

    def decode(self, arrays: Arrays) -> Doubles:
        return Mxfp4(arrays["codes"], arrays["scales"]).to_doubles()

    def bound(self, values: Values, arrays: Arrays) -> Doubles:
        return _NOTHING


def _count_pairs(rows: int) -> int:
    if rows % 2:
        raise ValueError(f"{rows} rows cannot be packed in pairs")
    return rows // 2


def _expect_mxfp4(values: Values) -> Mxfp4:
    if not isinstance(values, Mxfp4):
        raise ValueError(f"experts are made of MXFP4, not of {type(values).__name__} numbers")
    return values


def _powers(source: Mxfp4, floats: np.dtype[Any], limits: np.dtype[Any]) -> Floats:
    """2**(exponent - 127) [rows, blocks], in `floats` and for weights in `limits`.

    0 for a block of zeros with an exponent outside the limits; raises ValueError for any other block there.
    """
    lowest, highest = _EXPONENTS[limits]
    outside = (source.exponents < lowest) | (source.exponents > highest)
    if _not_zero(source.packed[outside]).any():
        raise ValueError(f"it has scales outside {limits}'s range")
    exponents = np.where(outside, 0, source.exponents.astype(np.int32) - MXFP4_BIAS)
    powers: Floats = np.where(outside, 0, np.ldexp(1.0, exponents)).astype(floats)
    return powers


def _not_zero(packed: Bytes) -> Bytes:
    """The bytes without their signs."""
    return packed & np.uint8(0x77)
