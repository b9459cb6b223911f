from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.forms.values import Blocks, Bytes, Doubles
from export.sources.ggml import PACKINGS, decode, row_bytes
from export.spec import Kind
from tests.export import ggml_bytes

KINDS = list(PACKINGS)
BLOCK_KINDS = [kind for kind in KINDS if not kind.is_float]


@st.composite
def source_bytes(draw: st.DrawFn, kind: Kind) -> Bytes:
    """Any bytes of 1-3 rows of 256 or 512 weights; numbers that say how large the others are, are finite."""
    rows, columns = draw(st.integers(1, 3)), draw(st.sampled_from([256, 512]))
    size = rows * ggml_bytes.row_bytes(kind, columns)
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).copy()
    packs = raw.reshape(-1, ggml_bytes.block_bytes(kind))
    # Keeps exponents below the one that means infinity or not a number.
    if kind in ggml_bytes.HALVES:
        for place in ggml_bytes.HALVES[kind]:
            packs[:, place + 1] &= 0xBB
    elif kind is Kind.F16:
        packs[:, -1] &= 0xBB
    else:
        packs[:, -2] &= 0x7F
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_weights_are_those_of_the_gguf_library(kind: Kind, data: st.DataObject) -> None:
    raw = data.draw(source_bytes(kind))
    columns = raw.shape[1] // ggml_bytes.block_bytes(kind) * PACKINGS[kind].elements
    found = decode(raw, kind).to_doubles()
    assert np.array_equal(found.astype(np.float32), ggml_bytes.weights(raw, kind, (len(raw), columns)))


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K])
@given(data=st.data())
def test_k_quants_are_the_very_numbers_of_ggmls_formulas(kind: Kind, data: st.DataObject) -> None:
    raw = data.draw(source_bytes(kind))
    formula = {Kind.Q4_K: q4_k, Kind.Q6_K: q6_k}[kind]
    for row, found in zip(raw.reshape(-1, PACKINGS[kind].size_bytes), numbers(raw, kind), strict=True):
        assert found.tolist() == formula(row.tobytes())


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_blocks_are_codes_of_their_width_with_products_that_a_float32_holds(kind: Kind) -> None:
    blocks = decode(ggml_bytes.random_rows(np.random.default_rng(1), kind, (16, 512)), kind)
    assert isinstance(blocks, Blocks)
    assert blocks.codes.max() == {Kind.Q6_K: 159}.get(kind, (1 << blocks.bits) - 1)
    signed = blocks.codes.astype(np.float64) - blocks.half
    products = signed * blocks.scales[..., None].astype(np.float64)
    assert np.array_equal(products, products.astype(np.float32))
    symmetric = kind in (Kind.Q4_0, Kind.Q8_0, Kind.Q6_K)
    assert np.array_equal(blocks.minimums, -blocks.half * blocks.scales) == symmetric


def test_low_nibbles_are_the_first_half_of_a_block() -> None:
    raw = np.zeros((1, 20), np.uint8)
    raw[0, 4:] = np.arange(16) | (15 - np.arange(16)) << 4
    blocks = decode(raw, Kind.Q4_1)
    assert isinstance(blocks, Blocks)
    assert blocks.codes[0, 0].tolist() == [*range(16), *range(15, -1, -1)]


def test_doubles_do_not_round_where_floats_would() -> None:
    raw = np.frombuffer(struct.pack("<ee", 2.0**-24, 65504) + bytes([1] + [0] * 15), np.uint8)
    assert decode(raw.reshape(1, -1), Kind.Q4_1).to_doubles()[0, 0] == 65504 + 2.0**-24
    assert np.float32(65504) + np.float32(2.0**-24) == 65504


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_takes_what_the_library_says(kind: Kind) -> None:
    assert row_bytes(kind, 768) == ggml_bytes.row_bytes(kind, 768)


def test_a_row_of_half_a_block_has_no_size() -> None:
    with pytest.raises(ValueError, match="rows of 128 do not divide into blocks of 256"):
        row_bytes(Kind.Q4_K, 128)


def numbers(raw: Bytes, kind: Kind) -> Doubles:
    """The weights of each superblock."""
    return decode(raw, kind).to_doubles().reshape(-1, PACKINGS[kind].elements)


def q4_k(block: bytes) -> list[float]:
    """dequantize_row_q4_K and get_scale_min_k4 of ggml, one number at a time in float64."""
    d, least = struct.unpack_from("<ee", block)
    packed, codes = block[4:16], block[16:]
    weights = []
    for part in range(8):
        if part < 4:
            scale, minimum = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = (packed[part + 4] & 15) | (packed[part - 4] >> 6) << 4
            minimum = (packed[part + 4] >> 4) | (packed[part] >> 6) << 4
        for byte in codes[part // 2 * 32 : part // 2 * 32 + 32]:
            weights.append(d * scale * (byte >> 4 if part % 2 else byte & 15) - least * minimum)
    return weights


def q6_k(block: bytes) -> list[float]:
    """dequantize_row_q6_K of ggml, one number at a time in float64."""
    low, high, scales = block[:128], block[128:192], struct.unpack_from("<16b", block, 192)
    (d,) = struct.unpack_from("<e", block, 208)
    weights = [0.0] * 256
    for half in range(2):
        for i in range(32):
            bits = high[half * 32 + i]
            near, far = low[half * 64 + i], low[half * 64 + 32 + i]
            for quarter, nibble in enumerate((near & 15, far & 15, near >> 4, far >> 4)):
                code = (nibble | (bits >> 2 * quarter & 3) << 4) - 32
                place = half * 128 + quarter * 32 + i
                weights[place] = d * scales[place // 16] * code
    return weights
