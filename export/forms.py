"""The ways a matrix can lie in an ONNX file, for the operators that will read it.

A form is a pair of functions and a promise: `encode` turns source numbers into arrays, `decode` gives the real numbers
that the operator makes of those arrays, and `exact` says that the two are equal. `stored` tells shapes beforehand, so
that sizes and places in the data file are known before anything is read.

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

from export.values import Doubles, Values

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Stored:
    """One array of a form: its shape, and its element type by ONNX's number (TensorProto.DataType) and numpy's."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    tensor_type: int

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
        """Whether `decode(encode(values))` equals `values`, as real numbers, for every source it accepts."""
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
