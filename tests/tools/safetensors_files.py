"""The safetensors container by hand: written tensor by tensor in bounded memory, and bent on purpose.

A file is 8 bytes of header length (little endian), a JSON header padded with spaces to a multiple of 8, then the
tensors' bytes without gaps (the format's own description, safetensors 0.8). The library refuses to write what is
wrong and wants all of a file in memory; tests need both otherwise. Does not know what the tensors mean.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Header: TypeAlias = dict[str, Any]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "F32": np.dtype(np.float32),
    "I32": np.dtype(np.int32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
}
"""The format's name of each type that the tests use, widest first."""

METADATA = "__metadata__"


@dataclass(frozen=True)
class StoredTensor:
    """What a file will hold under `name`; `pieces` gives the elements in order, in arrays of any length."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Array]]

    @property
    def nbytes(self) -> int:
        """The size in the file."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def stored(name: str, values: Array) -> StoredTensor:
    """An array that is in memory already."""
    return StoredTensor(name, dtype_name(values), values.shape, lambda: [values])


def dtype_name(values: Array) -> str:
    """The format's name of an array's type."""
    return next(name for name, dtype in DTYPES.items() if dtype == values.dtype)


def write_safetensors(path: Path, tensors: Iterable[StoredTensor]) -> None:
    """Write a file; holds one piece of one tensor at a time. Tensors lie in the library's order: wide types, names."""
    widths = list(DTYPES)
    ordered = sorted(tensors, key=lambda tensor: (widths.index(tensor.dtype), tensor.name))
    with path.open("wb") as file:
        file.write(_packed(_header_of(ordered)))
        for tensor in ordered:
            written = 0
            for piece in tensor.pieces():
                written += file.write(np.ascontiguousarray(piece).view(np.uint8).data)
            assert written == tensor.nbytes, tensor.name


def read_header(path: Path) -> Header:
    """The parsed JSON header, `__metadata__` included."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: Header = json.loads(file.read(length))
    return header


def read_tensor(path: Path, name: str) -> Array:
    """One tensor, copied."""
    entry = read_header(path)[name]
    begin, end = entry["data_offsets"]
    return np.frombuffer(_data(path)[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])


def shard_of(folder: Path, name: str) -> Path:
    """The file of a checkpoint that holds a tensor, by the index or, without one, the only file there is."""
    index = folder / "model.safetensors.index.json"
    return folder / (json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors")


def rewrite_header(path: Path, change: Callable[[Header], None]) -> None:
    """Let `change` bend the header in place; the tensors' bytes stay as they are."""
    header, data = read_header(path), _data(path)
    change(header)
    path.write_bytes(_packed(header) + data)


def relabel_tensor(path: Path, name: str, **fields: Any) -> None:
    """Say something else of a tensor (dtype=, shape=, data_offsets=) without touching its bytes."""
    rewrite_header(path, lambda header: header[name].update(fields))


def replace_tensor(path: Path, name: str, values: Array) -> None:
    """Put other values, of any type and shape, under a name; the file stays well formed."""
    _rewrite(path, lambda tensors: [stored(name, values) if tensor.name == name else tensor for tensor in tensors])


def remove_tensor(path: Path, name: str) -> None:
    """Take one tensor out; the file stays well formed, an index beside it does not learn of it."""
    _rewrite(path, lambda tensors: [tensor for tensor in tensors if tensor.name != name])


def _rewrite(path: Path, change: Callable[[Sequence[StoredTensor]], Sequence[StoredTensor]]) -> None:
    names = [name for name in read_header(path) if name != METADATA]
    write_safetensors(path, change([stored(name, read_tensor(path, name)) for name in names]))


def _header_of(tensors: Sequence[StoredTensor]) -> Header:
    return {METADATA: {"format": "pt"}, **dict(_entries(tensors))}


def _entries(tensors: Sequence[StoredTensor]) -> Iterator[tuple[str, Header]]:
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        yield tensor.name, {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end


def _packed(header: Header) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _data(path: Path) -> bytes:
    whole = path.read_bytes()
    return whole[8 + struct.unpack("<Q", whole[:8])[0] :]
