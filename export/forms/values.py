"""The numbers of a source tensor, as they are stored: floats, blocks of codes, or MXFP4.

Each is a matrix [rows, columns] that can be cut by rows. None of them rounds: `to_doubles` gives the very real
numbers that the checkpoint stands for. Does not know files, tensor names or ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

#: The fp4 codes' magnitudes; bit 3 is the sign. Source: OCP Microscaling Formats (MX) 1.0, E2M1.
MXFP4_VALUES: Floats = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
MXFP4_BLOCK = 32
MXFP4_BIAS = 127


@dataclass(frozen=True)
class Plain:
    """Every weight for itself: float32 [rows, columns], exactly the stored F32, F16 or BF16."""

    weights: Floats

    def __len__(self) -> int:
        return len(self.weights)

    def rows(self, start: int, stop: int) -> Plain:
        """A range of rows."""
        return Plain(self.weights[start:stop])

    def to_doubles(self) -> Doubles:
        """The weights [rows, columns]."""
        return self.weights.astype(np.float64)


@dataclass(frozen=True)
class Blocks:
    """weight = code * scale + minimum, one scale and one minimum a block of neighbours in a row.

    codes uint8 [rows, blocks, size] in 0 .. 2**bits - 1; scales and minimums float32 [rows, blocks], both such that
    code * scale is exact in float32 and the sum exact in float64.
    """

    bits: int
    codes: Bytes
    scales: Floats
    minimums: Floats

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def half(self) -> int:
        """The code that a symmetric kernel takes for zero."""
        return 1 << (self.bits - 1)

    def rows(self, start: int, stop: int) -> Blocks:
        """A range of rows."""
        return Blocks(self.bits, self.codes[start:stop], self.scales[start:stop], self.minimums[start:stop])

    def to_doubles(self) -> Doubles:
        """The weights [rows, columns]."""
        scales, minimums = self.scales.astype(np.float64), self.minimums.astype(np.float64)
        weights: Doubles = self.codes * scales[..., None] + minimums[..., None]
        return weights.reshape(len(self.codes), -1)


@dataclass(frozen=True)
class Mxfp4:
    """weight = MXFP4_VALUES[code] * 2**(exponent - 127), an exponent a block of 32, as published.

    packed uint8 [rows, blocks, 16]: byte b holds element 2b in its low nibble, 2b + 1 in the high one.
    exponents uint8 [rows, blocks]; 255 is no number.
    """

    packed: Bytes
    exponents: Bytes

    def __len__(self) -> int:
        return len(self.packed)

    def rows(self, start: int, stop: int) -> Mxfp4:
        """A range of rows."""
        return Mxfp4(self.packed[start:stop], self.exponents[start:stop])

    def to_doubles(self) -> Doubles:
        """The weights [rows, columns]."""
        codes = np.stack([self.packed & np.uint8(15), self.packed >> np.uint8(4)], axis=-1)
        values = MXFP4_VALUES.astype(np.float64)[codes.reshape(*self.packed.shape[:-1], MXFP4_BLOCK)]
        scales = np.ldexp(1.0, self.exponents.astype(np.int32) - MXFP4_BIAS)
        weights: Doubles = (values * scales[..., None]).reshape(len(self.packed), -1)
        return weights


Values: TypeAlias = Plain | Blocks | Mxfp4


def concatenate(parts: list[Values]) -> Values:
    """Stack matrices of one type, width and block size by rows."""
    if len(parts) == 1:
        return parts[0]
    match parts[0]:
        case Plain():
            return Plain(np.concatenate([part.weights for part in parts if isinstance(part, Plain)]))
        case Blocks(bits=bits):
            blocks = [part for part in parts if isinstance(part, Blocks)]
            return Blocks(
                bits,
                np.concatenate([part.codes for part in blocks]),
                np.concatenate([part.scales for part in blocks]),
                np.concatenate([part.minimums for part in blocks]),
            )
        case Mxfp4():
            codes = [part for part in parts if isinstance(part, Mxfp4)]
            return Mxfp4(
                np.concatenate([part.packed for part in codes]), np.concatenate([part.exponents for part in codes])
            )
