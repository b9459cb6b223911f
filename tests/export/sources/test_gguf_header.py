from __future__ import annotations

import io
import re
import struct
import tracemalloc
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import pytest

from export.errors import SourceError
from export.sources.gguf_header import TENSOR_TYPES, Header, read_header
from export.spec import Kind
from tests.export.tiny_gguf import TinyLlama

STRING, ARRAY = 8, 9
HUGE = (1 << 63) - 1


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)


def file(*parts: bytes, keys: int = 0, tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def whole(header: bytes, data_bytes: int) -> bytes:
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + bytes(data_bytes)


def read(data: bytes) -> Header:
    return read_header(io.BytesIO(data), len(data), "x.gguf")


def refusal(data: bytes) -> str:
    with pytest.raises(SourceError) as caught:
        read(data)
    assert str(caught.value).count("x.gguf") == 1
    return str(caught.value)


def test_the_header_is_that_which_the_library_reads(tmp_path: Path) -> None:
    model = TinyLlama()
    model.metadata |= {"a.float": 0.1, "a.flag": True, "a.flags": [True, False], "a.numbers": [1, -2]}
    path = model.write(tmp_path / "tiny.gguf")
    theirs = gguf.GGUFReader(path)
    with path.open("rb") as source:
        header = read_header(source, path.stat().st_size, str(path))
    ours = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in header.metadata.items()}
    assert ours == {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert [
        (name, place.info.shape, place.info.kind.value, place.offset, place.size_bytes)
        for name, place in header.tensors.items()
    ] == [
        (
            tensor.name,
            tuple(reversed(tensor.shape.tolist())),
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
        for tensor in theirs.tensors
    ]


def test_types_are_called_as_the_library_calls_them() -> None:
    theirs = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    assert {number: theirs[number] for number in TENSOR_TYPES} == TENSOR_TYPES


def test_tensors_begin_where_the_alignment_puts_them() -> None:
    header = file(
        key("general.alignment", 4, struct.pack("<I", 512)),
        tensor("a", (3,), 0, 0),
        tensor("b", (5,), 0, 512),
        keys=1,
        tensors=2,
    )
    places = read(header.ljust(512, b"\0") + bytes(532)).tensors
    assert [(place.offset, place.size_bytes) for place in places.values()] == [(512, 12), (1024, 20)]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\3\4 and so on", "is not a GGUF file"),
        (b"GGUF\3\0", "cut short"),
        (file(version=1), "version 1"),
        (file(version=4), "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (file(keys=HUGE), "cut short"),
        (file(tensors=HUGE), "cut short"),
        (file(struct.pack("<Q", HUGE), keys=1), "cut short"),
        (file(key("a", ARRAY, struct.pack("<IQ", 0, HUGE)), bytes(64), keys=1), "cut short"),
        (file(key("a", ARRAY, struct.pack("<IQ", 7, HUGE)), bytes(64), keys=1), "cut short"),
        (file(key("a", ARRAY, struct.pack("<IQ", STRING, HUGE)), bytes(64), keys=1), "cut short"),
        (file(key("a", ARRAY, struct.pack("<IQIQ", ARRAY, 1, ARRAY, 1)), keys=1), "unknown type 9"),
        (file(key("a", 13, b""), keys=1), "unknown type 13"),
        (file(key("a" * 300, 0, b"1"), keys=1), "a name has 300 bytes"),
        (file(key("a", STRING, struct.pack("<Q", 2) + b"\xff\xff"), keys=1), "not UTF-8"),
        (file(*[key("a", 0, b"\1")] * 2, keys=2), "'a' comes twice"),
        (file(key("general.alignment", 4, struct.pack("<I", 48)), keys=1), "alignment is 48"),
        (file(key("general.alignment", STRING, text("32")), keys=1), "alignment is '32'"),
        (file(key("split.count", 2, struct.pack("<H", 3)), keys=1), "one of 3 parts .* join them"),
        (
            file(key("split.count", ARRAY, struct.pack("<IQ2H", 2, 2, 1, 2)), keys=1),
            "'split.count' .* a list of 2",
        ),
        (file(key("split.count", 6, struct.pack("<f", 3.0)), keys=1), "one of 3.0 parts"),
        (file(key("general.alignment", 7, b"\1"), keys=1), "alignment is True"),
        (
            file(key("general.alignment", ARRAY, struct.pack("<IQ2H", 2, 2, 32, 32)), keys=1),
            "a list of 2, where one",
        ),
        (file(tensor("a", (), 0, 0), tensors=1), "'a' has 0 axes"),
        (file(tensor("a", (1,) * 5, 0, 0), tensors=1), "'a' has 5 axes"),
        (file(tensor("a", (4, 0), 0, 0), tensors=1), "'a' has a side of length 0"),
        (file(tensor("a", (32, 33), 2, 0), tensors=1), "'a' is Q4_0, but its rows of 33 do not divide"),
        (file(tensor("a", (1, 256), 13, 0), tensors=1), "'a' of x.gguf is stored as Q5_K; .* Q4_0, .* Q6_K"),
        (file(tensor("a", (1, 256), 39, 0), tensors=1), "stored as MXFP4"),
        (file(tensor("a", (1, 256), 99, 0), tensors=1), "stored as type 99; this exporter carries over"),
        (file(tensor("a", (8,), 0, 32), tensors=1), "'a' begins at 32 of the data, not at 0"),
        (whole(file(tensor("a", (8,), 0, 0), tensor("a", (8,), 0, 32), tensors=2), 64), "'a' comes twice"),
        (whole(file(tensor("a", (1 << 40,) * 4, 0, 0), tensors=1), 64), "cut short"),
        (whole(file(tensor("a", (8,), 0, 0), tensors=1), 31), "cut short: it has 95 bytes, its tensors end at 96"),
    ],
)
def test_what_is_no_whole_gguf_is_refused_in_one_sentence(data: bytes, sentence: str) -> None:
    assert re.search(sentence, refusal(data))


class Endless(io.RawIOBase, BinaryIO):
    """A file as large as anybody likes, of ones after its beginning; counts what is read."""

    def __init__(self, beginning: bytes) -> None:
        self._beginning = io.BytesIO(beginning)
        self.count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = self._beginning.read(size)
        self.count += size or 0
        return data.ljust(size or 0, b"\1")


@pytest.mark.parametrize(
    "beginning",
    [
        file(key("a", ARRAY, struct.pack("<IQ", 0, 1 << 39)), keys=1),
        file(struct.pack("<Q", 1 << 39), keys=1),
        file(key("a", STRING, struct.pack("<Q", 1 << 39)), keys=1),
        file(key("a", ARRAY, struct.pack("<IQ", STRING, HUGE)), keys=1),
        file(tensors=HUGE),
        file(keys=HUGE),
    ],
)
def test_a_large_file_does_not_make_a_large_header(beginning: bytes) -> None:
    source = Endless(beginning)
    with pytest.raises(SourceError, match="32 MiB"):
        read_header(source, 1 << 40, "x.gguf")
    assert source.count < 1000


def test_a_length_that_lies_costs_no_memory() -> None:
    data = file(key("a", ARRAY, struct.pack("<IQ", STRING, HUGE)), bytes(1 << 17), keys=1)
    tracemalloc.start()
    try:
        refusal(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20


def test_every_kind_has_a_number() -> None:
    assert {kind.value for kind in Kind} <= set(TENSOR_TYPES.values())
