from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from tests.tools.safetensors_files import (
    Array,
    StoredTensor,
    read_header,
    read_tensor,
    relabel_tensor,
    remove_tensor,
    replace_tensor,
    rewrite_header,
    stored,
    write_safetensors,
)

TENSORS: dict[str, Array] = {
    "codes": np.arange(45, dtype=np.uint8).reshape(5, 9),
    "norm": np.array([1.5, -2.25, 0.125]).astype(ml_dtypes.bfloat16),
    "table": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "half": np.array([[0.5], [65504.0]], np.float16),
    "none": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, [stored(name, values) for name, values in TENSORS.items()])
    return path


def opened(path: Path) -> dict[str, Array]:
    """What the safetensors library finds in a file."""
    with safe_open(path, framework="numpy") as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118, it is no mapping


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), name
        assert found[name].tobytes() == values.tobytes(), name


def test_the_library_reads_what_was_written(file: Path) -> None:
    assert_same(opened(file), TENSORS)


def test_the_header_ends_on_a_multiple_of_eight_and_calls_the_format_pt(file: Path) -> None:
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert length % 8 == 0
    assert read_header(file)["__metadata__"] == {"format": "pt"}


def test_what_is_read_back_is_what_was_written(file: Path) -> None:
    assert_same({name: read_tensor(file, name) for name in TENSORS}, TENSORS)


def test_pieces_are_written_in_order(tmp_path: Path) -> None:
    def pieces() -> Iterator[Array]:
        yield np.arange(5, dtype=np.float32)
        yield np.arange(5, 12, dtype=np.float32).reshape(7, 1)

    write_safetensors(tmp_path / "x", [StoredTensor("x", "F32", (3, 4), pieces)])
    assert_same(opened(tmp_path / "x"), {"x": np.arange(12, dtype=np.float32).reshape(3, 4)})


def test_a_replaced_tensor_may_have_another_type_and_shape(file: Path) -> None:
    replace_tensor(file, "norm", np.ones((2, 2), np.float32))
    assert_same(opened(file), TENSORS | {"norm": np.ones((2, 2), np.float32)})


def test_a_removed_tensor_is_gone_and_the_others_are_whole(file: Path) -> None:
    remove_tensor(file, "table")
    assert_same(opened(file), {name: values for name, values in TENSORS.items() if name != "table"})


def test_a_relabelled_tensor_keeps_its_bytes(file: Path) -> None:
    relabel_tensor(file, "half", dtype="BF16")
    found = opened(file)["half"]
    assert (found.dtype, found.tobytes()) == (ml_dtypes.bfloat16, TENSORS["half"].tobytes())


def test_a_header_can_be_made_to_lie(file: Path) -> None:
    rewrite_header(file, lambda header: header["codes"].update(shape=[5, 10]))
    with pytest.raises(SafetensorError):
        opened(file)
