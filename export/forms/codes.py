"""Codes as ONNX Runtime's block-quantised operators read them: weight = (code - half) * scale, half = 2**(bits-1).

Codes of eight bits are bytes; codes of four lie two a byte, the even element in the low nibble, as in MXFP4.
Does not know where codes come from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.forms.values import Bytes, Doubles

_LOW = np.uint8(15)
_HIGH = np.uint8(4)


def pack_codes(codes: Bytes, bits: int) -> Bytes:
    """[..., n] one code a byte -> [..., n * bits / 8]."""
    if bits == 8:
        return codes
    packed: Bytes = codes[..., 1::2] << _HIGH
    packed |= codes[..., 0::2]
    return packed


def unpack_codes(packed: Bytes, bits: int) -> Bytes:
    """Inverse of `pack_codes`."""
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, _LOW, out=codes[..., 0::2])
    np.right_shift(packed, _HIGH, out=codes[..., 1::2])
    return codes


def signed_products(packed: Bytes, scales: NDArray[Any], bits: int) -> Doubles:
    """packed [rows, blocks, block * bits / 8], scales [rows, blocks] -> (code - half) * scale [rows, blocks, block].

    In float64, which does not round: a code has 8 bits, a scale 24.
    """
    products: Doubles = unpack_codes(packed, bits).astype(np.float64)
    products -= 1 << (bits - 1)
    products *= scales.astype(np.float64)[..., None]
    return products


def count_blocks(columns: int, block: int) -> int:
    """Blocks in a row; raises ValueError if they do not come out even."""
    if columns % block:
        raise ValueError(f"its rows of {columns} weights cannot be cut into blocks of {block}")
    return columns // block
