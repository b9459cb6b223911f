from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.forms.codes import count_blocks, pack_codes, signed_products, unpack_codes


@given(st.binary(min_size=32, max_size=32), st.sampled_from([4, 8]))
def test_packing_and_unpacking_gives_the_same_codes(data: bytes, bits: int) -> None:
    codes = np.frombuffer(data, np.uint8).reshape(2, 16) & np.uint8((1 << bits) - 1)
    packed = pack_codes(codes, bits)
    assert packed.shape == (2, 2 * bits)
    assert np.array_equal(unpack_codes(packed, bits), codes)


def test_the_even_element_lies_in_the_low_nibble() -> None:
    assert pack_codes(np.arange(4, dtype=np.uint8), 4).tolist() == [0x10, 0x32]


def test_products_are_not_rounded() -> None:
    scale = np.float32(1 + 2**-23)
    products = signed_products(np.array([[[255]]], np.uint8), np.array([[scale]]), 8)
    assert products.item() == 127 * (1 + 2.0**-23)


def test_a_row_that_ends_inside_a_block_is_refused() -> None:
    assert count_blocks(96, 32) == 3
    with pytest.raises(ValueError, match="rows of 100 weights cannot be cut into blocks of 32"):
        count_blocks(100, 32)
