"""GGUF's block formats as numbers: bytes <-> codes, scales and minimums.

Every format here cuts a matrix row into blocks of 32 weights, each weight being

    weight = code * scale + minimum         code unsigned; one scale and one minimum a block

so that the rest of the exporter knows one shape of matrix, `Blocks`. Sources: ggml's
`block_q4_1` (fp16 d, fp16 m, 16 bytes: low nibbles are elements 0..15, high nibbles 16..31) and
`block_q8_0` (fp16 d, 32 signed bytes).

Does not know files, tensor names or ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
_HALF_BYTES = 2

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


class BlockFormat(StrEnum):
    """The block formats that can be carried over without loss."""

    Q4_1 = "Q4_1"
    Q8_0 = "Q8_0"

    @property
    def bits(self) -> int:
        """Width of one code."""
        match self:
            case BlockFormat.Q4_1:
                return 4
            case BlockFormat.Q8_0:
                return 8

    @property
    def block_bytes(self) -> int:
        """Size of one block of 32 weights in the source."""
        match self:
            case BlockFormat.Q4_1:
                return 2 * _HALF_BYTES + BLOCK // 2
            case BlockFormat.Q8_0:
                return _HALF_BYTES + BLOCK

    @property
    def is_symmetric(self) -> bool:
        """Whether minimum == -2**(bits-1) * scale always, so that nothing but codes and scales is needed."""
        return self is BlockFormat.Q8_0


@dataclass(frozen=True)
class Blocks:
    """A matrix [rows, blocks * 32] as weight = codes * scales + minimums.

    codes uint8 [rows, blocks, 32] in 0 .. 2**bits - 1; scales and minimums float32 [rows, blocks].
    Scales come from fp16, hence `codes * scales` is exact in float32.
    """

    bits: int
    codes: Bytes
    scales: Floats
    minimums: Floats

    @property
    def half(self) -> int:
        """The code that a symmetric kernel takes for zero."""
        return 1 << (self.bits - 1)

    def rows(self, start: int, stop: int) -> Blocks:
        """A range of rows."""
        return Blocks(self.bits, self.codes[start:stop], self.scales[start:stop], self.minimums[start:stop])

    def to_doubles(self) -> Doubles:
        """The weights [rows, blocks * 32] without any rounding.

        A code has at most 8 bits, a scale 11, and fp16 values are multiples of 2**-24 below 2**16: products and
        sums fit into the 53 bits of a double.
        """
        scales, minimums = self.scales.astype(np.float64), self.minimums.astype(np.float64)
        weights: Doubles = self.codes * scales[..., None] + minimums[..., None]
        return weights.reshape(self.codes.shape[0], -1)


def decode(raw: Bytes, block_format: BlockFormat) -> Blocks:
    """Read source bytes [rows, row_bytes]; inverse of `encode`."""
    grouped = raw.reshape(raw.shape[0], -1, block_format.block_bytes)
    scales = _halves(grouped[..., :_HALF_BYTES])
    match block_format:
        case BlockFormat.Q4_1:
            minimums = _halves(grouped[..., _HALF_BYTES : 2 * _HALF_BYTES])
            nibbles = grouped[..., 2 * _HALF_BYTES :]
            return Blocks(4, np.concatenate([nibbles & 15, nibbles >> 4], axis=-1), scales, minimums)
        case BlockFormat.Q8_0:
            # x ^ 0x80 on the byte is x + 128 on the signed number.
            return Blocks(8, grouped[..., _HALF_BYTES:] ^ np.uint8(128), scales, scales * np.float32(-128))


def encode(blocks: Blocks, block_format: BlockFormat) -> Bytes:
    """Write the source bytes [rows, row_bytes]; scales (and Q4_1's minimums) must be fp16 values."""
    scales = _half_bytes(blocks.scales)
    match block_format:
        case BlockFormat.Q4_1:
            nibbles = blocks.codes[..., :16] | blocks.codes[..., 16:] << 4
            parts = [scales, _half_bytes(blocks.minimums), nibbles]
        case BlockFormat.Q8_0:
            parts = [scales, blocks.codes ^ np.uint8(128)]
    return np.concatenate(parts, axis=-1).reshape(blocks.codes.shape[0], -1)


def concatenate(parts: list[Blocks]) -> Blocks:
    """Stack matrices of one width of code by rows: [r1 + r2 + ..., blocks * 32]."""
    return Blocks(
        parts[0].bits,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate([part.minimums for part in parts]),
    )


def _halves(raw: Bytes) -> Floats:
    """fp16 bytes [..., 2] -> float32 [...]."""
    return np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float32)


def _half_bytes(values: Floats) -> Bytes:
    """float32 [...] holding fp16 values -> bytes [..., 2]."""
    return np.ascontiguousarray(values.astype("<f2"))[..., None].view(np.uint8)
