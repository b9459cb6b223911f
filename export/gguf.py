"""GGUF files: metadata at once, tensors one at a time through a memory map.

The container is read by PyPI's `gguf`; this module turns its surprises into sentences. Does not know what the
tensors mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from export.errors import SourceError
from export.layouts import unpermute_rotary
from export.llama_spec import Metadata, TensorInfo
from export.onnx_graph import Matrix
from export.quantize import Blocks, Bytes, Floats, concatenate, decode

_MAGIC = b"GGUF"


class GgufFile:
    """An open GGUF. `metadata` holds Python values (str, int, float, bool, lists of them)."""

    def __init__(self, path: Path) -> None:
        """Read everything but the tensors' bytes; raises SourceError if this is no whole GGUF."""
        self.path = path
        self._reader = _open(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.metadata: Metadata = {name: field.contents() for name, field in self._reader.fields.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Names, shapes (rows first) and kinds."""
        return {
            name: TensorInfo(name, tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name)
            for name, tensor in self._tensors.items()
        }

    def size_bytes(self, name: str) -> int:
        """Size of one tensor in the file."""
        return int(self._tensors[name].n_bytes)

    def raw(self, name: str) -> Bytes:
        """A quantised tensor's bytes [rows, row_bytes], not copied."""
        return np.asarray(self._tensors[name].data)

    def floats(self, name: str) -> Floats:
        """An F32 tensor's values, not copied."""
        values = np.asarray(self._tensors[name].data, dtype=np.float32)
        _refuse_infinite(name, values)
        return values


def read_matrix(matrix: Matrix, source: GgufFile) -> Blocks:
    """The matrix that the graph wants, out of its source tensors; raises SourceError if some are not finite."""
    blocks = []
    for part in matrix.parts:
        decoded = decode(source.raw(part.tensor), matrix.block_format)
        _refuse_infinite(part.tensor, decoded.scales, decoded.minimums)
        blocks.append(unpermute_rotary(decoded, part.rotary_heads))
    return concatenate(blocks)


def file_sha256(path: Path) -> str:
    """Digest of the source file; raises SourceError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise SourceError(f"There is no file {path}; `scripts/get-model` fetches one.") from error
    except OSError as error:
        raise SourceError(f"The file {path} cannot be read ({error.strerror}); name a GGUF file.") from error


def _refuse_infinite(name: str, *values: Floats) -> None:
    if not all(np.isfinite(part).all() for part in values):
        raise SourceError(f"The tensor {name!r} holds values that are not finite; the file is damaged, fetch it again.")


def _open(path: Path) -> gguf.GGUFReader:
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise SourceError(f"{path} is not a GGUF file (it starts with {magic!r}); name a file that ends in .gguf.")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        # The reader slices a memory map without looking: past its end it fails in any of these ways.
        raise SourceError(f"{path} is cut short or damaged ({error}); fetch it again.") from error
