"""The header of a GGUF file: its metadata, and where each tensor lies. Reads from bytes that nobody vouches for.

Read here and not by PyPI's `gguf`, which maps the whole file, believes every count and length that it finds, and goes
on past the end. Here a length is compared with the bytes that are left before anything is read, a header has at most
MAX_HEADER_BYTES, and tensors must follow each other as llama.cpp wants them, so that a wrong offset shows.
Source: the GGUF specification, versions 2 and 3 (they differ in byte order only, and big-endian files are refused).

    magic, version u32, tensors u64, keys u64
    keys x (name, type u32, value)       strings: length u64 and UTF-8; arrays: type u32, length u64, values
    tensors x (name, axes u32, sizes u64 innermost first, type u32, offset u64 from the data's start)
    padding, data: each tensor padded to `general.alignment`

Does not know what keys and tensors mean.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from export.errors import SourceError
from export.sources import ggml
from export.spec import Kind, TensorInfo

Value: TypeAlias = str | int | float | bool | list[str] | NDArray[Any]
Metadata: TypeAlias = Mapping[str, Value]
Single: TypeAlias = str | int | float | bool

#: Real headers are mostly vocabulary: 8 MB for Llama 3. At worst (short strings only) this many bytes take 3 s and
#: 250 MB.
MAX_HEADER_BYTES = 32 << 20
MAX_AXES = 4
MAX_NAME_BYTES = 128
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32

_BOOL, _STRING, _ARRAY = 7, 8, 9
#: Type numbers of the metadata's numbers.
# fmt: off
_NUMBERS: Mapping[int, str] = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8",
}
#: Type numbers of tensors, those that the exporter does not read included: an error should call them by name.
TENSOR_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}
# fmt: on


def single(metadata: Metadata, key: str, where: str) -> Single | None:
    """The one value of a key, None if it is missing; raises SourceError, naming `where`, for an array."""
    value = metadata.get(key)
    if isinstance(value, list | np.ndarray):
        raise SourceError(
            f"The key {key!r} of {where} holds {shown_value(value)}, where one value is meant; take another file of "
            "this model."
        )
    return value


def shown_value(value: object) -> str:
    """A value as a message may print it: of bounded length, an array by its length."""
    if isinstance(value, list | np.ndarray):
        return f"a list of {len(value)}"
    return f"{value!r:.80}"


@dataclass(frozen=True)
class Place:
    """A tensor and where its bytes begin in the file."""

    info: TensorInfo
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, without padding."""
        return prod(self.info.shape[:-1]) * ggml.row_bytes(self.info.kind, self.info.columns)


@dataclass(frozen=True)
class Header:
    """Metadata by key (numbers as Python's, arrays of numbers as numpy's), tensors by GGUF's names."""

    metadata: Metadata
    tensors: Mapping[str, Place]


def read_header(file: BinaryIO, size_bytes: int, where: str) -> Header:
    """Everything before the tensors' bytes; raises SourceError, beginning with `where`, for what is no whole GGUF."""
    cursor = _Cursor(file, size_bytes, where)
    _check_beginning(cursor)
    count_tensors, count_keys = cursor.unsigned(8), cursor.unsigned(8)
    metadata: dict[str, Value] = {}
    for _ in range(count_keys):
        name = cursor.name()
        if name in metadata:
            raise cursor.damaged(f"the key {name!r} comes twice")
        metadata[name] = _value(cursor, name)
    _refuse_parts(metadata, where)
    found: list[tuple[TensorInfo, int]] = []
    for _ in range(count_tensors):
        found.append(_tensor(cursor))
    return Header(metadata, _places(cursor, found, _alignment(cursor, metadata)))


class _Cursor:
    """Reads little-endian values in turn. `left`: what the header may still have."""

    def __init__(self, file: BinaryIO, size_bytes: int, where: str) -> None:
        self.where = where
        self.size_bytes = size_bytes
        self.position = 0
        self._file = file

    @property
    def left(self) -> int:
        return min(self.size_bytes, MAX_HEADER_BYTES) - self.position

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise self._too_short()
        data = self._file.read(count)
        if len(data) != count:
            raise self._too_short()
        self.position += count
        return data

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def name(self) -> str:
        """A key's or tensor's name: short enough for an error to quote."""
        data = self.take(self.unsigned(8))
        if len(data) > MAX_NAME_BYTES:
            raise self.damaged(f"a name has {len(data)} bytes")
        return self._decoded(data)

    def text(self) -> str:
        return self._decoded(self.take(self.unsigned(8)))

    def _decoded(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"the text {data[:40]!r} is not UTF-8") from error

    def damaged(self, reason: str) -> SourceError:
        return SourceError(f"{self.where} is damaged: in its header {reason}; fetch it again.")

    def _too_short(self) -> SourceError:
        if self.size_bytes <= MAX_HEADER_BYTES:
            return SourceError(f"{self.where} is cut short or damaged: its header ends past its end; fetch it again.")
        return self.damaged(f"a length goes beyond {MAX_HEADER_BYTES >> 20} MiB")


def _check_beginning(cursor: _Cursor) -> None:
    magic = cursor.take(len(_MAGIC)) if cursor.left >= len(_MAGIC) else b""
    if magic != _MAGIC:
        raise SourceError(
            f"{cursor.where} is not a GGUF file (it starts with {magic!r}); name a file that ends in .gguf."
        )
    version = cursor.unsigned(4)
    if version & 0xFFFF == 0:
        raise SourceError(f"{cursor.where} is a big-endian GGUF; take the little-endian one.")
    if version not in _VERSIONS:
        raise SourceError(f"{cursor.where} is a GGUF of version {version}; take one of version 3, or 2.")


def _value(cursor: _Cursor, name: str) -> Value:
    kind = cursor.unsigned(4)
    if kind == _STRING:
        return cursor.text()
    if kind == _ARRAY:
        return _array(cursor, name)
    single = _numbers(cursor, name, kind, 1)
    value: int | float | bool = single[0].item()
    return value


def _array(cursor: _Cursor, name: str) -> list[str] | NDArray[Any]:
    kind, count = cursor.unsigned(4), cursor.unsigned(8)
    if kind != _STRING:
        return _numbers(cursor, name, kind, count)
    strings: list[str] = []
    for _ in range(count):
        strings.append(cursor.text())
    return strings


def _numbers(cursor: _Cursor, name: str, kind: int, count: int) -> NDArray[Any]:
    if kind == _BOOL:
        return np.frombuffer(cursor.take(count), np.uint8).astype(np.bool_)
    if kind not in _NUMBERS:
        raise cursor.damaged(f"the key {name!r} has a value of the unknown type {kind}")
    dtype = np.dtype(_NUMBERS[kind])
    return np.frombuffer(cursor.take(count * dtype.itemsize), dtype)


def _refuse_parts(metadata: Metadata, where: str) -> None:
    count = single(metadata, "split.count", where)
    if count is not None and count not in (0, 1):
        raise SourceError(
            f"{where} is one of {shown_value(count)} parts of a model; join them with llama.cpp's "
            "`llama-gguf-split --merge` and name the result."
        )


def _alignment(cursor: _Cursor, metadata: Metadata) -> int:
    stated = single(metadata, "general.alignment", cursor.where)
    alignment = _DEFAULT_ALIGNMENT if stated is None else stated
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.damaged(f"the alignment is {shown_value(alignment)}, not a power of two")
    return alignment


def _tensor(cursor: _Cursor) -> tuple[TensorInfo, int]:
    """One tensor and its offset in the data."""
    name = cursor.name()
    axes = cursor.unsigned(4)
    if not 1 <= axes <= MAX_AXES:
        raise cursor.damaged(f"the tensor {name!r} has {axes} axes")
    innermost_first = struct.unpack(f"<{axes}Q", cursor.take(8 * axes))
    number, offset = cursor.unsigned(4), cursor.unsigned(8)
    info = TensorInfo(name, tuple(reversed(innermost_first)), _kind(cursor, name, number))
    if not prod(info.shape):
        raise cursor.damaged(f"the tensor {name!r} has a side of length 0")
    try:
        ggml.row_bytes(info.kind, info.columns)
    except ValueError as error:
        raise cursor.damaged(f"the tensor {name!r} is {info.kind}, but its {error}") from error
    return info, offset


def _kind(cursor: _Cursor, tensor: str, number: int) -> Kind:
    name = TENSOR_TYPES.get(number, f"type {number}")
    for kind in ggml.PACKINGS:
        if kind.value == name:
            return kind
    raise SourceError(
        f"The tensor {tensor!r} of {cursor.where} is stored as {name}; this exporter carries over "
        f"{', '.join(ggml.PACKINGS)}: take a GGUF of those types."
    )


def _places(cursor: _Cursor, found: list[tuple[TensorInfo, int]], alignment: int) -> dict[str, Place]:
    start = _aligned(cursor.position, alignment)
    places: dict[str, Place] = {}
    end = expected = 0
    for info, offset in found:
        if info.name in places:
            raise cursor.damaged(f"the tensor {info.name!r} comes twice")
        if offset != expected:
            raise cursor.damaged(f"the tensor {info.name!r} begins at {offset} of the data, not at {expected}")
        place = Place(info, start + offset)
        places[info.name] = place
        end = place.offset + place.size_bytes
        expected = _aligned(offset + place.size_bytes, alignment)
    if end > cursor.size_bytes:
        raise SourceError(
            f"{cursor.where} is cut short: it has {cursor.size_bytes} bytes, its tensors end at {end}; fetch it again."
        )
    return places


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
