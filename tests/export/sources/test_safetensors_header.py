"""Headers of safetensors files: what the library writes is understood, everything else is refused by name."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from export.errors import SourceError
from export.sources.safetensors_header import DTYPE_BITS, MAX_HEADER_BYTES, HeaderTensor, header_bytes, parse_header

WHERE = "model.safetensors"
Shapes = st.lists(st.integers(0, 5), max_size=4)


def parse(data: bytes) -> dict[str, HeaderTensor]:
    """A whole file, as the readers go about it."""
    size = header_bytes(data[:8], len(data), WHERE)
    return parse_header(data[8 : 8 + size], len(data), WHERE)


def file_of(header: Mapping[str, Any] | bytes, data_bytes: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def entry(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@given(
    arrays=st.dictionaries(st.text(min_size=1, max_size=9), st.tuples(Shapes, st.sampled_from("feBlQ?")), max_size=6)
)
def test_what_the_library_writes_is_found_where_it_wrote_it(arrays: dict[str, tuple[list[int], str]]) -> None:
    random = np.random.default_rng(len(arrays))
    values = {name: random.integers(0, 2, shape).astype(kind) for name, (shape, kind) in arrays.items()}
    data = save(values, metadata={"format": "pt"})
    found = parse(data)
    assert found.keys() == values.keys()
    for name, tensor in found.items():
        assert tensor.shape == values[name].shape
        assert data[tensor.offset : tensor.offset + tensor.size_bytes] == values[name].tobytes()


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    header = {"late": entry([2], 4, 12), "early": entry([1], 0, 4)}
    assert list(parse(file_of(header, 12))) == ["early", "late"]


@pytest.mark.parametrize(("dtype", "bits"), DTYPE_BITS.items())
def test_every_type_of_the_format_has_a_size(dtype: str, bits: int) -> None:
    (tensor,) = parse(file_of({"x": entry([4, 2], 0, bits, dtype)}, bits)).values()
    assert (tensor.dtype, tensor.size_bytes) == (dtype, bits)


@pytest.mark.parametrize(
    ("header", "data_bytes", "words"),
    [
        ({"x": entry([2], 0, 8)}, 7, r"cut short: the tensor 'x' should end at byte \d+"),
        ({"x": entry([2], 0, 8)}, 9, "1 bytes that belong to no tensor"),
        ({}, 1, "1 bytes that belong to no tensor"),
        ({"x": entry([2], 0, 8), "y": entry([1], 4, 8)}, 8, r"tensor 'y' .* should begin at byte"),
        ({"x": entry([2], 0, 8), "y": entry([1], 12, 16)}, 16, r"tensor 'y' .* should begin at byte"),
        ({"x": entry([2], 4, 12)}, 12, r"tensor 'x' .* should begin at byte"),
        ({"x": entry([2], 0, 4)}, 4, "tensor 'x' .* has 4 bytes, which does not fit F32"),
        ({"x": entry([], 4, 0)}, 0, "tensor 'x' .* has -4 bytes"),
        ({"x": entry([-2], 0, 8)}, 8, r"tensor 'x' .* badly described .*\$.shape"),
        ({"x": entry([2.5], 0, 8)}, 8, r"tensor 'x' .* badly described .*\$.shape"),
        ({"x": entry([True, 2], 0, 8)}, 8, r"tensor 'x' .* badly described .*\$.shape"),
        ({"x": entry([1 << 62, 1 << 62], 0, 8)}, 8, r"tensor 'x' .* badly described .*\$.shape"),
        ({"x": entry([10**300], 0, 8)}, 8, r"tensor 'x' .* badly described .*\$.shape"),
        ({"x": entry([1] * 50, 0, 4)}, 4, r"tensor 'x' .* badly described .*\$.shape"),
        ({"x": entry([2], -8, 0)}, 8, r"tensor 'x' .* badly described .*\$.data_offsets"),
        ({"x": entry([2], 0, 1 << 63)}, 8, r"tensor 'x' .* badly described .*\$.data_offsets"),
        ({"x": entry([2], 0, 8, "Q4_K")}, 8, "tensor 'x' .* of the type 'Q4_K', which this version does not know"),
        ({"x": entry([2], 0, 8) | {"more": 1}}, 8, "tensor 'x' .* badly described"),
        ({"x": {}}, 8, "tensor 'x' .* badly described"),
        ({"x": 3}, 8, "tensor 'x' .* badly described"),
        (b"[]", 0, "no JSON object"),
        (b"", 0, "not JSON"),
        (b'{"x": \xff}', 0, "not JSON"),
        (b'{"x": ' + b"[" * 100_000, 0, "not JSON"),
        (b'{"x": ' + b"9" * 100_000 + b"}", 0, "not JSON"),
        (b'{"x": 1, "y": 2, "x": 3}', 0, "names 'x' twice"),
        (b'{"x": {"dtype": "F32", "shape": [], "shape": [2], "data_offsets": [0, 8]}}', 8, "names 'shape' twice"),
        (b'{"\\ud800": 1}', 0, r"tensor '\\ud800'"),
    ],
)
def test_a_header_that_does_not_account_for_every_byte_is_refused(
    header: dict[str, Any] | bytes, data_bytes: int, words: str
) -> None:
    with pytest.raises(SourceError, match=words) as refusal:
        parse(file_of(header, data_bytes))
    assert WHERE in refusal.value.message
    assert len(refusal.value.message.encode()) < 1000


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it has 0 bytes"),
        (b"\x02\0\0", "it has 3 bytes"),
        (b"\x09\0\0\0\0\0\0\0{}", "cut short inside its header"),
        (b"\xff" * 16, "are the most that is read"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "are the most that is read"),
    ],
)
def test_a_length_that_the_file_does_not_have_is_refused_before_anything_is_read(data: bytes, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        header_bytes(data[:8], len(data), WHERE)


WHOLE = save(
    {"a": np.ones((2, 3), np.float32), "b": np.zeros((0, 3), np.float16), "ü": np.ones(5, np.uint8)}, {"format": "pt"}
)


@settings(deadline=None)
@given(size=st.integers(0, len(WHOLE) - 1))
def test_a_file_that_ends_early_is_refused_wherever_it_ends(size: int) -> None:
    with pytest.raises(SourceError):
        parse(WHOLE[:size])


@settings(max_examples=400, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, len(WHOLE) - 30), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_give_a_refusal_or_tensors_that_lie_in_the_file(flips: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for place, value in flips:
        data[place] = value
    try:
        found = parse(bytes(data))
    except SourceError:
        return
    assert all(tensor.offset + tensor.size_bytes <= len(data) for tensor in found.values())
    assert sum(tensor.size_bytes for tensor in found.values()) == len(data) - min(t.offset for t in found.values())


@pytest.mark.parametrize("piece", [b"[],", b'"%d":1,', b'{"a":[[[[[]]]]]},'])
def test_a_hostile_header_takes_memory_by_its_length(piece: bytes) -> None:
    count = 200_000 // len(piece)
    many = b"".join(piece % index if b"%" in piece else piece for index in range(count))[:-1]
    text = b'{"x":{%s}}' % many if piece.startswith(b'"') else b'{"x":[%s]}' % many
    tracemalloc.start()
    with pytest.raises(SourceError):
        parse_header(text, len(text) + 8, WHERE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 * len(text)


def test_a_name_that_occurs_twice_is_found_among_many() -> None:
    names = [*range(200_000), 199_999]
    text = b"{" + b",".join(b'"%d":1' % name for name in names) + b"}"
    with pytest.raises(SourceError, match="names '199999' twice"):
        parse_header(text, len(text) + 8, WHERE)
