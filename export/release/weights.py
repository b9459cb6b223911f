"""Weights from a checkpoint into the data file, a few rows at a time, each measured against its source on the way.

A matrix's arrays lie one after the other, and rows come in slices that hold something of each: the first array, the
large one, is written as it comes; the others wait until it is complete. Does not know recipes or what a release is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from export.errors import SourceError
from export.forms.fidelity import Fidelity, measure
from export.forms.form import Form
from export.forms.matrix import DenseFloat
from export.graphs.builder import Matrix, Table, Vector
from export.release.places import Place
from export.release.writer import DataFile
from export.sources.checkpoint import Checkpoint
from export.spec import TensorInfo

SLICE_WEIGHTS = 1 << 20
"""Weights in a slice: a few MB of each of the arrays and of the float64 copies that they are compared in."""


SLICES_AHEAD = 8


@dataclass(frozen=True)
class Slice:
    """Rows of a source tensor."""

    tensor: str
    start: int
    stop: int


Encoded: TypeAlias = tuple[Slice, dict[str, NDArray[Any]], Fidelity]


@dataclass(frozen=True)
class WeightWriter:
    """Writes one weight after the other, in the order of their places.

    helpers: threads that read, encode and measure slices. progress: told the weight that is being written, and how
    many bytes of the file there are.
    """

    checkpoint: Checkpoint
    file: DataFile
    helpers: Executor
    progress: Callable[[str, int], None]

    def write(self, weight: Matrix | Vector | Table, places: Sequence[Place]) -> dict[str, Fidelity]:
        """Write a weight's initialisers; returns how near each of its source tensors they are.

        Raises SourceError, naming file and tensor, if the weight cannot be what its form promises.
        """
        match weight:
            case Table(values=values):
                self.file.append(values)
                self._end(places[0])
                return {}
            case Vector(dtype=dtype):
                return self._write_arrays(weight, DenseFloat(dtype, exact=dtype == np.float32), places)
            case Matrix(form=form):
                return self._write_arrays(weight, form, places)

    def _write_arrays(self, weight: Matrix | Vector, form: Form, places: Sequence[Place]) -> dict[str, Fidelity]:
        fidelity: dict[str, Fidelity] = {}
        first, *others = self._arrays(weight, form)
        streams = form.rows_axis(first) == 0
        waiting: dict[str, list[NDArray[Any]]] = {name: [] for name in others}
        for rows in _groups(weight, self.checkpoint.tensors):
            parts: dict[str, list[NDArray[Any]]] = {name: [] for name in (first, *others)}
            for piece, arrays, found in self._encoded(rows, form):
                self.progress(weight.name, self.file.size_bytes)
                fidelity[piece.tensor] = fidelity[piece.tensor] + found if piece.tensor in fidelity else found
                for name, array in arrays.items():
                    if name == first and streams:
                        self.file.append(array)
                    else:
                        parts[name].append(array)
            if not streams:
                self.file.append(_join(parts[first], form.rows_axis(first)))
            for name in others:
                waiting[name].append(_join(parts[name], form.rows_axis(name)))
        self._end(places[0])
        for place, name in zip(places[1:], others, strict=True):
            for array in waiting[name]:
                self.file.append(array)
            self._end(place)
        return fidelity

    def _arrays(self, weight: Matrix | Vector, form: Form) -> list[str]:
        """Names of a form's arrays, in the order of their places."""
        tensor = self.checkpoint.tensors[weight.tensors[0]]
        return list(form.stored(tensor.rows, tensor.columns))

    def _encoded(self, pieces: Iterable[Slice], form: Form) -> Iterator[Encoded]:
        """Slices in order, encoded by all helpers at once."""
        ahead: deque[Future[Encoded]] = deque()
        for piece in pieces:
            ahead.append(self.helpers.submit(self._encode, piece, form))
            if len(ahead) > SLICES_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _encode(self, piece: Slice, form: Form) -> Encoded:
        values = self.checkpoint.read(piece.tensor, piece.start, piece.stop)
        try:
            arrays = form.encode(values)
        except ValueError as error:
            raise SourceError(
                f"{self._where(piece)} cannot be stored as {form.label} ({error}); choose another --recipe."
            ) from error
        found = measure(values, arrays, form)
        if found.broken:
            raise SourceError(
                f"{found.broken} weights of {self._where(piece)} would not keep what {form.label} promises; "
                "choose another --recipe, and please report the model."
            )
        return piece, arrays, found

    def _where(self, piece: Slice) -> str:
        """The tensor, and the file that holds it."""
        (extent, *_) = self.checkpoint.extents(piece.tensor)
        return f"The tensor {piece.tensor!r} of {extent.path}"

    def _end(self, place: Place) -> None:
        """Check that the initialiser is as long as was planned, and fill up its page."""
        if self.file.size_bytes != sum(place.span):
            raise RuntimeError(f"{place.name} ends at {self.file.size_bytes}, not at {sum(place.span)}")
        self.file.end_initialiser()
        self.progress(place.name, self.file.size_bytes)


def _groups(weight: Matrix | Vector, tensors: Mapping[str, TensorInfo]) -> Iterator[list[Slice]]:
    """Slices of each expert, or of the whole weight if it has none."""
    experts = weight.experts if isinstance(weight, Matrix) else 0
    if not experts:
        yield [piece for tensor in weight.tensors for piece in _slices(tensors[tensor], 0, tensors[tensor].rows)]
        return
    for tensor in weight.tensors:
        rows = tensors[tensor].rows // experts
        for expert in range(experts):
            yield list(_slices(tensors[tensor], expert * rows, (expert + 1) * rows))


def _slices(tensor: TensorInfo, first: int, end: int) -> Iterator[Slice]:
    """Rows first to end of a tensor in slices of about SLICE_WEIGHTS, an even number of rows in each but the last."""
    columns = tensor.columns if len(tensor.shape) > 1 else 1
    rows = max(2, SLICE_WEIGHTS // columns & ~1)
    for start in range(first, end, rows):
        yield Slice(tensor.name, start, min(start + rows, end))


def _join(arrays: list[NDArray[Any]], axis: int) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)
