from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import claims
from export.errors import SourceError
from export.layouts import (
    Corrected,
    Layout,
    Symmetric,
    ZeroPointed,
    arrays,
    lay_out,
    layout_type,
    pack_codes,
    unpack_codes,
    unpermute_rotary,
)
from export.quantize import BLOCK, BlockFormat, Blocks
from export.recipes import Recipe
from tests.export.tiny_gguf import random_blocks

# Of the size that weights have; larger ones are refused, which has tests of its own.
halves = st.builds(math.ldexp, st.integers(-1023, 1023), st.integers(-24, -14))


@st.composite
def q4_1_blocks(draw: st.DrawFn) -> Blocks:
    """One row of one to three blocks, scale 0 among them."""
    count = draw(st.integers(1, 3))
    codes = draw(st.binary(min_size=BLOCK * count, max_size=BLOCK * count))
    lists = st.lists(halves, min_size=count, max_size=count)
    return Blocks(
        4,
        np.frombuffer(codes, np.uint8).reshape(1, count, BLOCK) & np.uint8(15),
        np.array([draw(lists)], np.float32),
        np.array([draw(lists)], np.float32),
    )


@given(st.binary(min_size=BLOCK, max_size=BLOCK), st.sampled_from([4, 8]))
def test_packing_and_unpacking_gives_the_same_codes(data: bytes, bits: int) -> None:
    codes = np.frombuffer(data, np.uint8).reshape(1, 1, BLOCK) & np.uint8((1 << bits) - 1)
    packed = pack_codes(codes, bits)
    assert packed.shape == (1, 1, 4 * bits)
    assert np.array_equal(unpack_codes(packed, bits), codes)


def test_the_even_element_lies_in_the_low_nibble() -> None:
    codes = np.arange(BLOCK, dtype=np.uint8).reshape(1, 1, BLOCK) & np.uint8(15)
    assert pack_codes(codes, 4)[0, 0, :2].tolist() == [0x10, 0x32]


@given(q4_1_blocks())
def test_the_served_form_is_exact(blocks: Blocks) -> None:
    written = lay_out(blocks, Corrected)
    claims.check("w", blocks, written)
    assert np.array_equal(written.to_doubles(), blocks.to_doubles())


@given(q4_1_blocks())
def test_the_oracle_form_is_within_rounding(blocks: Blocks) -> None:
    claims.check("w", blocks, lay_out(blocks, ZeroPointed))


def test_eight_bit_sources_need_no_correction() -> None:
    blocks = random_blocks(np.random.default_rng(3), BlockFormat.Q8_0, (4, 64))
    for recipe in Recipe:
        written = lay_out(blocks, layout_type(BlockFormat.Q8_0, recipe))
        assert sorted(arrays(written)) == ["codes", "scales"]
        assert np.array_equal(written.to_doubles(), blocks.to_doubles())


def test_a_block_of_scale_zero_is_its_minimum_in_every_form() -> None:
    codes = np.full((1, 1, BLOCK), 9, np.uint8)
    blocks = Blocks(4, codes, np.zeros((1, 1), np.float32), np.full((1, 1), -0.25, np.float32))
    for layout in (Corrected, ZeroPointed):
        written = lay_out(blocks, layout)
        assert (written.to_doubles() == -0.25).all()
        assert all(np.isfinite(values).all() for values in arrays(written).values())


@pytest.mark.parametrize("layout", [Symmetric, Corrected, ZeroPointed])
def test_a_slice_of_rows_holds_those_rows(layout: type[Layout]) -> None:
    written = lay_out(random_blocks(np.random.default_rng(5), BlockFormat.Q4_1, (6, 96)), layout)
    assert np.array_equal(written.rows(2, 5).to_doubles(), written.to_doubles()[2:5])


def test_neighbouring_rows_of_a_head_go_to_its_halves() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    blocks = Blocks(4, np.zeros((8, 1, BLOCK), np.uint8), rows, rows)
    assert unpermute_rotary(blocks, heads=2).scales[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert unpermute_rotary(blocks, heads=0) is blocks


def test_weights_that_a_float_cannot_hold_are_refused_not_rounded() -> None:
    codes = np.zeros((1, 1, BLOCK), np.uint8)
    blocks = Blocks(4, codes, np.full((1, 1), 2.0**-24, np.float32), np.full((1, 1), 65504, np.float32))
    with pytest.raises(SourceError, match=r"32 weights of 'w' cannot be carried over"):
        claims.check("w", blocks, lay_out(blocks, Corrected))


@pytest.mark.parametrize("layout", [Corrected, ZeroPointed])
def test_one_changed_code_breaks_the_claim(layout: type[Layout]) -> None:
    blocks = random_blocks(np.random.default_rng(9), BlockFormat.Q4_1, (2, 64))
    blocks.scales[:] = 0.01
    written = lay_out(blocks, layout)
    written.codes[1, 0, 3] ^= 1
    with pytest.raises(SourceError, match="1 weights of 'w'"):
        claims.check("w", blocks, written)
