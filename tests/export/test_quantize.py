from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.quantize import BLOCK, BlockFormat, Blocks, Bytes, concatenate, decode, encode
from tests.export.tiny_gguf import random_blocks


@st.composite
def source_bytes(draw: st.DrawFn, block_format: BlockFormat) -> Bytes:
    """Any bytes of 1-3 rows of 1-3 blocks whose scale and minimum are finite."""
    rows, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = rows * blocks * block_format.block_bytes
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).copy()
    headers = raw.reshape(-1, block_format.block_bytes)
    for high_byte in (1, 3) if block_format is BlockFormat.Q4_1 else (1,):
        headers[:, high_byte] &= 0xBB  # keeps the exponent below the one that means infinity or not a number
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("block_format", BlockFormat)
@given(data=st.data())
def test_decoding_and_encoding_gives_the_same_bytes(block_format: BlockFormat, data: st.DataObject) -> None:
    raw = data.draw(source_bytes(block_format))
    assert encode(decode(raw, block_format), block_format).tobytes() == raw.tobytes()


@pytest.mark.parametrize("block_format", BlockFormat)
@given(data=st.data())
def test_weights_are_those_of_the_gguf_library(block_format: BlockFormat, data: st.DataObject) -> None:
    raw = data.draw(source_bytes(block_format))
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[block_format.value])
    assert np.array_equal(decode(raw, block_format).to_doubles().astype(np.float32), theirs)


def test_low_nibbles_are_the_first_half_of_a_block() -> None:
    raw = np.zeros((1, BlockFormat.Q4_1.block_bytes), np.uint8)
    raw[0, 4:] = np.arange(16) | (15 - np.arange(16)) << 4
    assert decode(raw, BlockFormat.Q4_1).codes[0, 0].tolist() == [*range(16), *range(15, -1, -1)]


def test_doubles_do_not_round_where_floats_would() -> None:
    largest, smallest = np.float32(65504), np.float32(2.0**-24)
    codes = np.ones((1, 1, BLOCK), np.uint8)
    blocks = Blocks(4, codes, np.array([[smallest]]), np.array([[largest]]))
    assert blocks.to_doubles()[0, 0] == 65504 + 2.0**-24
    assert np.float32(65504) + smallest == largest


@pytest.mark.parametrize("block_format", BlockFormat)
def test_stacked_parts_keep_their_order(block_format: BlockFormat) -> None:
    random = np.random.default_rng(1)
    parts = [random_blocks(random, block_format, (rows, 64)) for rows in (2, 3)]
    stacked = concatenate(parts)
    assert np.array_equal(stacked.to_doubles(), np.concatenate([part.to_doubles() for part in parts]))
    assert np.array_equal(stacked.rows(2, 5).to_doubles(), parts[1].to_doubles())
