"""MXFP4 codes into other codes, by the byte: a byte holds two codes, so a table of 256 answers for both at once.

A full model has 19e9 of them. One look-up a byte, in pieces that stay in a core's cache, is several times faster than
arithmetic on nibbles. Codes and bytes as in `export/forms/values.py`; 2**(exponent - 127) is left to the caller.
Does not know operators or files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.forms.values import MXFP4_BLOCK, MXFP4_VALUES, Bytes, Doubles, Floats

_PIECE = 1 << 16
_TILE_ROWS = 256
_ROWS = 64
_BYTES = np.arange(256)
_LOW, _HIGH = _BYTES & 15, _BYTES >> 4

DOUBLED_ZERO = 128


def doubled(packed: Bytes) -> Bytes:
    """[...] bytes -> [..., 2] codes of 8 bits: 2 * value + 128, which is exact (values are multiples of 1/2)."""
    return look_up(_DOUBLED, packed).view(np.uint8).reshape(*packed.shape, 2)


def floats(packed: Bytes) -> Floats:
    """[...] bytes -> [..., 2] values as float32."""
    return look_up(_VALUES, packed).view(np.float32).reshape(*packed.shape, 2)


def transpose(packed: Bytes) -> Bytes:
    """A matrix of codes [rows, columns / 2] bytes -> [columns, rows / 2]; low nibbles are even columns, then even rows.

    In strips of rows whose cache lines survive until their next column is read: twice as fast as in one piece.
    """
    rows, half_columns = packed.shape
    out = np.empty((half_columns, 2, rows // 2), np.uint8)
    for start in range(0, rows, _TILE_ROWS):
        even, odd = packed[start : start + _TILE_ROWS : 2], packed[start + 1 : start + _TILE_ROWS : 2]
        strip = slice(start // 2, start // 2 + len(even))
        out[:, 0, strip] = (even & np.uint8(0x0F) | odd << np.uint8(4)).T
        out[:, 1, strip] = (even >> np.uint8(4) | odd & np.uint8(0xF0)).T
    return out.reshape(2 * half_columns, rows // 2)


def requantise(packed: Bytes) -> tuple[Bytes, Floats]:
    """[rows, blocks, 16] bytes -> 4-bit codes in the same places, and steps [rows, blocks]: value ~ (code - 8) * step.

    Lossy: fp4 values lie unevenly, codes evenly. Of three steps, extreme / -8, / -7 and / -6, each block takes the one
    with the least squared error. Relative RMS error of MXFP4 made of normal weights: 7.0 % (extreme / -8 alone 7.4 %,
    the best of 41 steps 6.7 %), of Student's t (4): 8.9 % (9.0 %, 8.6 %).
    """
    codes = np.empty_like(packed)
    steps = np.empty(packed.shape[:-1], np.float32)
    for start in range(0, len(packed), _ROWS):
        rows = slice(start, start + _ROWS)
        choices = _choose_steps(packed[rows])
        steps[rows] = _STEPS.reshape(-1)[choices]
        codes[rows] = look_up(_REQUANTISED.reshape(-1), _indices(choices, packed[rows]))
    return codes, steps


def _choose_steps(packed: Bytes) -> NDArray[np.uint16]:
    """The best row of `_STEPS.reshape(-1)` for each block [rows, blocks]."""
    extremes = look_up(_RANKS, packed).max(axis=-1).astype(np.uint16)
    sums = look_up(_ERRORS.reshape(-1), _indices(extremes, packed)).sum(axis=-1)
    errors = sums[..., None] >> _FIELDS & np.uint64(_FIELD_MASK)
    choices: NDArray[np.uint16] = extremes * np.uint16(len(_DIVISORS)) + errors.argmin(axis=-1).astype(np.uint16)
    return choices


def _indices(tables: NDArray[np.uint16], packed: Bytes) -> NDArray[np.uint16]:
    """Where a byte's answer lies when every block has its own table of 256."""
    indices: NDArray[np.uint16] = (tables << np.uint16(8))[..., None] | packed
    return indices


def look_up(table: NDArray[Any], indices: NDArray[Any]) -> NDArray[Any]:
    """table[indices], in pieces: numpy widens indices to 8 bytes each. "wrap" never wraps here, it spares a copy."""
    out = np.empty(indices.shape, table.dtype)
    source, target = indices.reshape(-1), out.reshape(-1)
    for start in range(0, source.size, _PIECE):
        piece = slice(start, start + _PIECE)
        table.take(source[piece], out=target[piece], mode="wrap")
    return out


def _pairs(of_code: NDArray[Any], pair: str) -> NDArray[Any]:
    """What a byte stands for, given what a code stands for: both elements in one number of type `pair`."""
    both = np.stack([of_code[_LOW], of_code[_HIGH]], axis=-1)
    return both.view(pair).reshape(256)


_DOUBLED = _pairs((2 * MXFP4_VALUES + DOUBLED_ZERO).astype(np.uint8), "u2")
_VALUES = _pairs(MXFP4_VALUES, "c8")

# A code's rank orders by magnitude, then sign: the largest rank of a block is its extreme value.
_DIVISORS = np.array([-8, -7, -6])
_RANK_OF_CODE = (np.arange(16) & 7) << 1 | np.arange(16) >> 3
_RANKS = np.maximum(_RANK_OF_CODE[_LOW], _RANK_OF_CODE[_HIGH]).astype(np.uint8)
_EXTREMES: Doubles = MXFP4_VALUES[np.argsort(_RANK_OF_CODE)].astype(np.float64)
# Of float16's precision, so that codes are nearest under float16 scales too.
_STEPS: Floats = (_EXTREMES[:, None] / _DIVISORS).astype(np.float16).astype(np.float32)
_QUOTIENTS: Doubles = MXFP4_VALUES / np.where(_STEPS == 0, 1, _STEPS)[..., None].astype(np.float64)
_CODES: Doubles = np.clip(np.rint(_QUOTIENTS), -8, 7)
_OF_CODE = (_CODES + 8).astype(np.uint8)
_REQUANTISED = _OF_CODE[..., _LOW] | _OF_CODE[..., _HIGH] << np.uint8(4)

# The three squared errors of a byte in one number, 21 bits each: one sum over a block adds up all three. An error is at
# most one step of 3/4, so 32 of them are at most 18 and, in units of 2**-16, fit. What cannot occur (a value beyond
# its block's extreme) is cut off.
_FIELDS = np.arange(3, dtype=np.uint64) * np.uint64(21)
_FIELD_MASK = (1 << 21) - 1
_OF_ERROR = np.minimum(((_CODES - _QUOTIENTS) * _STEPS[..., None]) ** 2 * 2**16, 2**21 / MXFP4_BLOCK - 1).astype(
    np.uint64
)
_ERRORS = ((_OF_ERROR[..., _LOW] + _OF_ERROR[..., _HIGH]) << _FIELDS[None, :, None]).sum(axis=1, dtype=np.uint64)
