"""ggml's block formats as numbers: the bytes of matrix rows -> `Plain` or `Blocks`.

Every block format cuts a row into blocks with one scale and one minimum each, weight = code * scale + minimum:

    Q4_0, Q4_1, Q8_0   blocks of 32: fp16 d, for Q4_1 fp16 m, then codes; 4-bit codes have elements 0..15 in the low
                       nibbles and 16..31 in the high ones
    Q4_K               superblocks of 256: fp16 d and dmin, 8 pairs of 6-bit numbers (s, m), 4-bit codes;
                       blocks of 32 with scale d * s and minimum -dmin * m
    Q6_K               superblocks of 256: 6-bit codes, 16 signed bytes s, fp16 d; blocks of 16 with scale d * s

so that the rest of the exporter knows one shape of matrix. Products of fp16 numbers with those of at most 8 bits are
exact in float32: nothing here rounds. Source: the structs `block_*` of ggml's ggml-common.h and their
`dequantize_row_*`. Does not know files, tensor names or ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from export.forms.values import Blocks, Bytes, Floats, Plain
from export.spec import Kind

_SUPERBLOCK = 256


@dataclass(frozen=True)
class Packing:
    """`elements` neighbours of a row take `size_bytes` bytes."""

    elements: int
    size_bytes: int


#: The kinds that `decode` reads.
PACKINGS: Mapping[Kind, Packing] = {
    Kind.F32: Packing(1, 4),
    Kind.F16: Packing(1, 2),
    Kind.BF16: Packing(1, 2),
    Kind.Q4_0: Packing(32, 18),
    Kind.Q4_1: Packing(32, 20),
    Kind.Q8_0: Packing(32, 34),
    Kind.Q4_K: Packing(_SUPERBLOCK, 144),
    Kind.Q6_K: Packing(_SUPERBLOCK, 210),
}


def row_bytes(kind: Kind, columns: int) -> int:
    """Size of a matrix row; raises ValueError unless it is a whole number of packs."""
    packing = PACKINGS[kind]
    if columns % packing.elements:
        raise ValueError(f"rows of {columns} do not divide into blocks of {packing.elements}")
    return columns // packing.elements * packing.size_bytes


def decode(raw: Bytes, kind: Kind) -> Plain | Blocks:
    """The numbers of source bytes [rows, row_bytes]."""
    match kind:
        case Kind.F32:
            return Plain(raw.view("<f4"))
        case Kind.F16:
            return Plain(raw.view("<f2").astype(np.float32))
        case Kind.BF16:
            return Plain((raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32))
    packs = raw.reshape(len(raw), -1, PACKINGS[kind].size_bytes)
    match kind:
        case Kind.Q4_0:
            scales = _halves(packs[..., :2])
            return Blocks(4, _nibbles(packs[..., 2:]), scales, scales * np.float32(-8))
        case Kind.Q4_1:
            return Blocks(4, _nibbles(packs[..., 4:]), _halves(packs[..., :2]), _halves(packs[..., 2:4]))
        case Kind.Q8_0:
            scales = _halves(packs[..., :2])
            # x ^ 0x80 on the byte is x + 128 on the signed number.
            return Blocks(8, packs[..., 2:] ^ np.uint8(128), scales, scales * np.float32(-128))
        case Kind.Q4_K:
            return _decode_q4_k(packs)
        case Kind.Q6_K:
            return _decode_q6_k(packs)
        case _:
            raise ValueError(f"ggml has no format {kind}")


def _decode_q4_k(packs: Bytes) -> Blocks:
    """d [2], dmin [2], pairs [12], codes [128]: 32 bytes hold a block in their low nibbles, the next in the high."""
    rows = len(packs)
    scale_codes, minimum_codes = _pairs(packs[..., 4:16])
    scales = _halves(packs[..., :2])[..., None] * scale_codes
    minimums = -_halves(packs[..., 2:4])[..., None] * minimum_codes
    codes = _nibbles(packs[..., 16:].reshape(rows, -1, 4, 32))
    return Blocks(4, codes.reshape(rows, -1, 32), scales.reshape(rows, -1), minimums.reshape(rows, -1))


def _pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight 6-bit scales and eight minimums out of 12 bytes.

    Bytes 0..3 and 4..7 hold the first four of each in their low 6 bits; the last four lie in the nibbles of bytes
    8..11 (scales low, minimums high), their two highest bits in what the first eight bytes leave.
    """
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minimums = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return scales, minimums


def _decode_q6_k(packs: Bytes) -> Blocks:
    """Low nibbles [128], high pairs of bits [64], scales [16], d [2], each half of the superblock for itself.

    64 bytes of low nibbles are the elements 0..63 and 64..127 of a half; byte i of its 32 bytes of high bits belongs
    to elements i, 32 + i, 64 + i and 96 + i, from the lowest bits up.
    """
    rows = len(packs)
    low = _nibbles(packs[..., :128].reshape(rows, -1, 2, 64)).reshape(rows, -1, 2, 4, 32)
    shifts = np.array([[0], [2], [4], [6]], np.uint8)
    high = packs[..., 128:192].reshape(rows, -1, 2, 1, 32) >> shifts & np.uint8(3)
    # The code c - 32 of a signed kernel is c - 32 + 128 of an unsigned 8-bit one.
    codes: Bytes = (low | high << np.uint8(4)) + np.uint8(96)
    scales = _halves(packs[..., 208:210])[..., None] * packs[..., 192:208].view(np.int8)
    scales = scales.reshape(rows, -1)
    return Blocks(8, codes.reshape(rows, -1, 16), scales, scales * np.float32(-128))


def _nibbles(packed: Bytes) -> Bytes:
    """[..., n] -> [..., 2n]: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _halves(raw: Bytes) -> Floats:
    """fp16 bytes [..., 2] -> float32 [...]."""
    return np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float32)
