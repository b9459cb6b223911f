"""The ways a matrix can lie in an ONNX file, for the operators that will read it.

A form is a pair of functions and a promise: `encode` turns source numbers into arrays, `decode` gives the real numbers
that the operator makes of those arrays. An exact form never rounds: it raises ValueError for numbers that it would have
to round. Any other form may round, and `bound` says how far. A form of one shape can be had both ways (8-bit blocks
carry a Q8_0 matrix exactly and quantise a float one); who makes it says which, knowing the kind of the source.
`stored` tells shapes beforehand, so that sizes and places in the data file are known before anything is read.
Implemented by `export/forms/matrix.py` and `export/forms/experts.py`.

Rows are cut into slices: `encode(slice)` for each slice, joined along `rows_axis`, is `encode(whole)`.
Does not know files, tensor names or graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from export.forms.values import Doubles, Values

Arrays = Mapping[str, NDArray[Any]]

FLOAT8E8M0 = 24
"""ONNX's type of a power of two, 2**(byte - 127); numpy has none, arrays of it are uint8 here."""
_TENSOR_TYPES = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.float16): 10}


@dataclass(frozen=True)
class Stored:
    """One array of a form: its shape, and its element type by ONNX's number (TensorProto.DataType) and numpy's."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    tensor_type: int

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Stored:
        """An array of uint8, float16 or float32."""
        return cls(shape, dtype, _TENSOR_TYPES[dtype])

    @property
    def size_bytes(self) -> int:
        """Bytes on disk without padding."""
        return prod(self.shape) * self.dtype.itemsize


class Form(Protocol):
    """How one matrix [rows, columns] is stored. The first array is the large one; the others may be held in memory."""

    @property
    def label(self) -> str:
        """For reports: "8-bit blocks of 32"."""
        ...

    @property
    def exact(self) -> bool:
        """Whether `decode(encode(values))` equals `values`, as real numbers, for every source that it accepts."""
        ...

    def stored(self, rows: int, columns: int) -> dict[str, Stored]:
        """The arrays by name; in the graph they are called `<matrix>.<name>`."""
        ...

    def rows_axis(self, array: str) -> int:
        """The axis of an array along which slices of rows are joined."""
        ...

    def encode(self, values: Values) -> dict[str, NDArray[Any]]:
        """The arrays of a slice; raises ValueError, saying why, for numbers that the form cannot hold."""
        ...

    def decode(self, arrays: Arrays) -> Doubles:
        """The weights [rows, columns] that the operator stands for."""
        ...

    def bound(self, values: Values, arrays: Arrays) -> Doubles:
        """How far each weight [rows, columns] may be from the source; zeros (or 0-d) for an exact form."""
        ...
