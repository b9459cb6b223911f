"""The safetensors files of a folder: one file, or several and an index; where each tensor lies, and its bytes.

A file is open only while something is read from it, so nothing has to be closed and a model of any number of files
needs one handle. Sources: `export/sources/safetensors_header.py`; the index as transformers writes it.
Does not know what the tensors mean.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import msgspec
import numpy as np

from export.errors import SourceError
from export.forms.values import Bytes
from export.sources.hf_json import decode_json, shown
from export.sources.safetensors_header import PREFIX_BYTES, HeaderTensor, header_bytes, parse_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_INDEX_BYTES = 64 << 20
#: Names only: an index says nothing about folders, and what it says otherwise came from somebody else.
_SHARD = re.compile(r"\w[\w.+ -]{0,200}\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Version:
    """What must stay the same while a checkpoint is read."""

    size_bytes: int
    changed_ns: int


@dataclass(frozen=True)
class Located:
    """A tensor and the file that holds it, as that file was when its header was read."""

    path: Path
    version: Version
    tensor: HeaderTensor


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def locate_tensors(folder: Path) -> dict[str, Located]:
    """Every tensor of the folder's model by name; raises SourceError unless all files are there and whole."""
    single, index = folder / SINGLE, folder / INDEX
    # In this order, as transformers looks for them.
    if single.exists():
        return _read_header(single)
    if not index.exists():
        raise SourceError(
            f"{folder} has neither {SINGLE} nor {INDEX}; name a folder with a model in safetensors, or a .gguf file."
        )
    located: dict[str, Located] = {}
    for file, names in read_index(index).items():
        located |= _read_shard(folder / file, names, index)
    return located


def read_index(index: Path) -> dict[str, set[str]]:
    """The files that an index names, in order, and the tensors that each must hold; raises SourceError."""
    names_of = defaultdict(set)
    for name, file in decode_json(read_small(index, _MAX_INDEX_BYTES), _Index, str(index)).weight_map.items():
        names_of[_shard_name(file, index)].add(name)
    return dict(sorted(names_of.items()))


def read_rows(located: Located, rows: int, start: int, stop: int) -> Bytes:
    """The bytes [stop - start, size of a row] of some rows of a tensor of `rows` rows; raises SourceError."""
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"rows {start} to {stop} of {rows}")
    tensor = located.tensor
    row_bytes = tensor.size_bytes // rows
    offset, size = tensor.offset + start * row_bytes, (stop - start) * row_bytes
    with _opened(located.path) as file:
        if _version(file) != located.version:
            raise SourceError(f"{located.path} changed while it was being read; export again when it is complete.")
        data = _read(file, offset, size, f"inside the tensor {shown(tensor.name)}", located.path)
    return data.reshape(stop - start, row_bytes)


def read_small(path: Path, most: int) -> bytes:
    """A whole file of at most `most` bytes; raises SourceError."""
    with _opened(path) as file:
        size = _version(file).size_bytes
        if size > most:
            raise SourceError(f"{path} has {size} bytes, more than the {most} that are read of such a file; check it.")
        return _read(file, 0, size, "early", path).tobytes()


def _shard_name(file: str, index: Path) -> str:
    if not _SHARD.fullmatch(file):
        raise SourceError(f"{index} names the file {shown(file)}, which is no name of a safetensors file beside it.")
    return file


def _read_shard(path: Path, names: set[str], index: Path) -> dict[str, Located]:
    """The tensors of one of several files, which must be those that the index says."""
    if not path.exists():
        raise SourceError(f"{path} is missing, {index.name} names it; fetch the checkpoint again, or the rest of it.")
    found = _read_header(path)
    for name in sorted(names ^ found.keys()):
        says, lacks = (index.name, path) if name in names else (path.name, index)
        raise SourceError(
            f"{lacks} has no tensor {shown(name)}, though {says} does; the files are not of one checkpoint, "
            "fetch it again."
        )
    return found


def _read_header(path: Path) -> dict[str, Located]:
    where = str(path)
    with _opened(path) as file:
        version = _version(file)
        prefix = file.read(PREFIX_BYTES) or b""
        size = header_bytes(prefix, version.size_bytes, where)
        text = _read(file, PREFIX_BYTES, size, "inside its header", path).tobytes()
    tensors = parse_header(text, version.size_bytes, where)
    return {name: Located(path, version, tensor) for name, tensor in tensors.items()}


def _read(file: FileIO, offset: int, size: int, place: str, path: Path) -> Bytes:
    """Exactly `size` bytes; a read may bring fewer than it was asked for, and none at the file's end."""
    data = np.empty(size, np.uint8)
    left = data.data
    while left:
        count = os.preadv(file.fileno(), [left], offset)
        if count == 0:
            raise SourceError(f"{path} ends {place}; fetch it again.")
        left, offset = left[count:], offset + count
    return data


def _version(file: FileIO) -> Version:
    status = os.fstat(file.fileno())
    return Version(status.st_size, status.st_mtime_ns)


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """The open file; whatever the operating system has against it becomes a SourceError."""
    try:
        # Asked first, because opening a pipe would wait for its other end.
        if not path.is_file():
            raise SourceError(f"There is no file {path}; fetch the checkpoint again.")
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); check the file and its disk.") from error
