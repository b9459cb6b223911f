"""What onnxruntime's quantised operators want to read, from `Blocks`, and back.

Operators `MatMulNBits` and `GatherBlockQuantized` of com.microsoft. Both take codes in row-major order; 4-bit codes
two a byte, the even element in the low nibble (GGUF has elements 0..15 low and 16..31 high). With no zero point they
compute (code - half) * scale, half = 2**(bits-1). Three layouts:

Symmetric     w = (code - half) * scale            for sources that are symmetric themselves.
Corrected     w = (code - half) * scale + c        c = minimum + half * scale, one a block: the product with c is a
              small float MatMul over the blocks' sums of x. Served. No rounding as long as c fits a float32: always
              when |minimum| + half * scale < 1, since fp16 values are multiples of 2**-24.
ZeroPointed   w = (code - z) * scale               z = -minimum / scale, a float32, rounded. The oracle.

A layout's arrays are its fields but `bits`; they become the initialisers `<matrix>.<field>`.
Does not know files, tensor names or graphs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.quantize import BlockFormat, Blocks, Bytes, Doubles, Floats
from export.recipes import Recipe


@dataclass(frozen=True)
class Symmetric:
    """codes uint8 [rows, blocks, 4 * bits]; scales float32 [rows, blocks]."""

    bits: int
    codes: Bytes
    scales: Floats

    def rows(self, start: int, stop: int) -> Symmetric:
        """A range of rows."""
        return Symmetric(self.bits, self.codes[start:stop], self.scales[start:stop])

    def to_doubles(self) -> Doubles:
        """The weights [rows, blocks * 32] that the operator stands for, without rounding (see Blocks.to_doubles)."""
        return _signed_products(self.bits, self.codes, self.scales).reshape(self.codes.shape[0], -1)


@dataclass(frozen=True)
class Corrected:
    """codes and scales as in Symmetric; corrections float32 [blocks, rows], a MatMul's right-hand side."""

    bits: int
    codes: Bytes
    scales: Floats
    corrections: Floats

    def rows(self, start: int, stop: int) -> Corrected:
        """A range of rows."""
        return Corrected(self.bits, self.codes[start:stop], self.scales[start:stop], self.corrections[:, start:stop])

    def to_doubles(self) -> Doubles:
        """The weights [rows, blocks * 32] that the operators stand for, without rounding."""
        corrections = self.corrections.T.astype(np.float64)
        weights = _signed_products(self.bits, self.codes, self.scales) + corrections[..., None]
        return weights.reshape(self.codes.shape[0], -1)


@dataclass(frozen=True)
class ZeroPointed:
    """codes and scales as in Symmetric; zero_points float32 [rows, blocks]."""

    bits: int
    codes: Bytes
    scales: Floats
    zero_points: Floats

    def rows(self, start: int, stop: int) -> ZeroPointed:
        """A range of rows."""
        return ZeroPointed(self.bits, self.codes[start:stop], self.scales[start:stop], self.zero_points[start:stop])

    def to_doubles(self) -> Doubles:
        """The weights [rows, blocks * 32] as the kernel unpacks them: in float32, rounded, then widened."""
        codes = unpack_codes(self.codes, self.bits).astype(np.float32)
        weights = (codes - self.zero_points[..., None]) * self.scales[..., None]
        return weights.reshape(self.codes.shape[0], -1).astype(np.float64)


Layout = Symmetric | Corrected | ZeroPointed


def layout_type(block_format: BlockFormat, recipe: Recipe) -> type[Layout]:
    """Which layout a recipe gives to matrices of a source format."""
    if block_format.is_symmetric:
        return Symmetric
    match recipe:
        case Recipe.GGUF_EXACT:
            return Corrected
        case Recipe.GGUF_PARITY:
            return ZeroPointed


def array_names(layout: type[Layout]) -> list[str]:
    """Names of a layout's arrays."""
    return [field.name for field in fields(layout) if field.name != "bits"]


def arrays(layout: Layout) -> dict[str, NDArray[Any]]:
    """A layout's arrays by name."""
    return {name: getattr(layout, name) for name in array_names(type(layout))}


def lay_out(blocks: Blocks, layout: type[Layout]) -> Layout:
    """Bring a matrix into a layout. Whether it came out exact is for `export/claims.py` to check."""
    if layout is Corrected:
        return _corrected(blocks)
    if layout is ZeroPointed:
        return _zero_pointed(blocks)
    return Symmetric(blocks.bits, pack_codes(blocks.codes, blocks.bits), blocks.scales)


def _corrected(blocks: Blocks) -> Corrected:
    corrections = blocks.minimums.astype(np.float64) + blocks.half * blocks.scales.astype(np.float64)
    return Corrected(
        blocks.bits,
        pack_codes(blocks.codes, blocks.bits),
        blocks.scales,
        np.ascontiguousarray(corrections.T, dtype=np.float32),
    )


def _zero_pointed(blocks: Blocks) -> ZeroPointed:
    """A block of scale 0 is constant: it becomes (1 - 0) * minimum, exactly."""
    constant = blocks.scales == 0
    scales = np.where(constant, blocks.minimums, blocks.scales)
    codes = np.where(constant[..., None], np.uint8(1), blocks.codes)
    zero_points = np.where(constant, np.float32(0), -blocks.minimums / np.where(constant, np.float32(1), blocks.scales))
    return ZeroPointed(blocks.bits, pack_codes(codes, blocks.bits), scales, zero_points)


def pack_codes(codes: Bytes, bits: int) -> Bytes:
    """[rows, blocks, 32] one code a byte -> [rows, blocks, 4 * bits] as the operators read them."""
    if bits == 8:
        return codes
    return codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)


def unpack_codes(packed: Bytes, bits: int) -> Bytes:
    """Inverse of `pack_codes`."""
    if bits == 8:
        return packed
    pairs: Bytes = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)


def unpermute_rotary(blocks: Blocks, heads: int) -> Blocks:
    """Undo llama.cpp's interleaving of q and k rows: rows 2i, 2i+1 of a head -> i, i + head_dim / 2.

    The halves are what GroupQueryAttention rotates (rotary_interleaved = 0). heads == 0: not such a matrix.
    """
    if heads == 0:
        return blocks
    order = np.arange(blocks.codes.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return Blocks(blocks.bits, blocks.codes[order], blocks.scales[order], blocks.minimums[order])


def _signed_products(bits: int, codes: Bytes, scales: Floats) -> Doubles:
    """(code - half) * scale [rows, blocks, 32] in float64, which does not round."""
    signed = unpack_codes(codes, bits).astype(np.float64) - (1 << (bits - 1))
    return signed * scales[..., None]
