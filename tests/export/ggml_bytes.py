"""Random rows in ggml's formats: any bytes will do, save for the fp16 numbers that say how large the weights are."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import gguf
import numpy as np

from export.forms.values import Bytes, Doubles
from export.spec import Kind

LARGEST = 0.2

#: Where a block's fp16 numbers lie, and what they are multiplied with at most, roughly.
HALVES: Mapping[Kind, Mapping[int, float]] = {
    Kind.Q4_0: {0: 8},
    Kind.Q4_1: {0: 15, 2: -1},
    Kind.Q8_0: {0: 128},
    Kind.Q4_K: {0: 32 * 15, 2: 64},
    Kind.Q6_K: {208: 64 * 32},
}


def block_bytes(kind: Kind) -> int:
    """Bytes of a block, as PyPI's gguf has it."""
    return int(gguf.GGML_QUANT_SIZES[library_type(kind)][1])


def row_bytes(kind: Kind, columns: int) -> int:
    """Bytes of a row, as PyPI's gguf has it."""
    return columns // int(gguf.GGML_QUANT_SIZES[library_type(kind)][0]) * block_bytes(kind)


def random_rows(random: np.random.Generator, kind: Kind, shape: tuple[int, ...]) -> Bytes:
    """Weights of about +-LARGEST, [rows, row_bytes] for a matrix; a tenth of the blocks have scale 0."""
    if kind.is_float:
        return float_bytes(random.uniform(-LARGEST, LARGEST, shape), kind)
    raw = random.integers(0, 256, (*shape[:-1], row_bytes(kind, shape[-1])), dtype=np.uint8)
    blocks = raw.reshape(-1, block_bytes(kind))
    for place, most in HALVES[kind].items():
        halves = random.uniform(0.5, 1, len(blocks)) * LARGEST / most
        halves[random.random(len(blocks)) < 0.1] = 0
        blocks[:, place : place + 2] = halves.astype("<f2")[:, None].view(np.uint8)
    return raw


def float_bytes(values: Doubles, kind: Kind) -> Bytes:
    """Floats rounded to a kind, [..., row_bytes]."""
    match kind:
        case Kind.BF16:
            stored = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
        case Kind.F16:
            stored = values.astype("<f2")
        case _:
            stored = values.astype("<f4")
    return stored.view(np.uint8)


def weights(raw: Bytes, kind: Kind, shape: tuple[int, ...]) -> Doubles:
    """The weights that PyPI's gguf reads out of the bytes; rounded to float32."""
    assert raw.size == prod(shape[:-1]) * row_bytes(kind, shape[-1])
    floats: Doubles = gguf.quants.dequantize(raw, library_type(kind)).astype(np.float64).reshape(shape)
    return floats


def library_type(kind: Kind) -> gguf.GGMLQuantizationType:
    """The library's name for a kind."""
    return gguf.GGMLQuantizationType[kind.value]
