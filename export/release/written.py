"""A graph file's initialisers as they lie on the disk, read a range at a time through the graph's own offsets.

Does not know where they ought to lie, or which source they were made from.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import TensorProto

from export.errors import TargetError
from export.forms.form import Form, Stored
from export.release.places import Place


class WrittenGraph:
    """A graph file and the data files that it names; `with` it."""

    def __init__(self, graph: Path) -> None:
        """Read the graph, not the weights; raises TargetError if it is none, or names a file that is not there."""
        if not os.path.isfile(graph):
            raise TargetError(f"{graph} is not there; export or copy the release again.")
        try:
            self.model = onnx.load(graph, format="protobuf", load_external_data=False)
        except (DecodeError, OSError) as error:
            raise TargetError(f"{graph} is not an ONNX graph ({error}); export the model again.") from error
        self._external = {
            tensor.name: tensor
            for tensor in self.model.graph.initializer
            if tensor.data_location == TensorProto.EXTERNAL
        }
        with ExitStack() as opening:
            locations = {self._place(name)[0] for name in self._external}
            self._descriptors = {location: _open(graph.parent, location, opening) for location in sorted(locations)}
            self._files = opening.pop_all()

    def __enter__(self) -> WrittenGraph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def read(self, name: str, stored: Stored, first: int, shape: tuple[int, ...]) -> NDArray[Any]:
        """An array out of an initialiser that is declared as `stored`: its elements from `first` on.

        Raises TargetError if it is declared otherwise in the graph, or if its bytes are not all there.
        """
        offset = self._offset(name, stored) + first * stored.dtype.itemsize
        data = self._pread(name, offset, prod(shape) * stored.dtype.itemsize)
        return np.frombuffer(data, stored.dtype).reshape(shape)

    def _offset(self, name: str, stored: Stored) -> int:
        location, offset, size_bytes = self._place(name)
        tensor = self._external[name]
        found, declared = (tuple(tensor.dims), tensor.data_type, size_bytes), (stored.shape, stored.tensor_type)
        if found != (*declared, stored.size_bytes):
            raise TargetError(
                f"The initialiser {name!r} is {found[:2]} in {size_bytes} bytes, {declared} in {stored.size_bytes} "
                "was expected; export the model again."
            )
        if offset + size_bytes > os.fstat(self._descriptors[location]).st_size:
            raise TargetError(f"{location} ends before {name!r} does; export or copy the release again.")
        return offset

    def _place(self, name: str) -> tuple[str, int, int]:
        """(file, offset, bytes) of an external initialiser; raises TargetError if there is none of that name."""
        tensor = self._external.get(name)
        if tensor is None:
            raise TargetError(f"The graph has no external initialiser {name!r}; export the model again.")
        entries = {entry.key: entry.value for entry in tensor.external_data}
        try:
            location, offset, size_bytes = entries["location"], int(entries["offset"]), int(entries["length"])
        except (KeyError, ValueError) as error:
            raise TargetError(
                f"The graph does not say where {name!r} lies ({error}); export the model again."
            ) from error
        if offset < 0 or size_bytes < 0:
            raise TargetError(
                f"The graph says that {name!r} lies at {offset} in {size_bytes} bytes; export the model again."
            )
        return location, offset, size_bytes

    def _pread(self, name: str, offset: int, size_bytes: int) -> bytearray:
        location, _, _ = self._place(name)
        data = bytearray(size_bytes)
        view, done = memoryview(data), 0
        while done < size_bytes:
            count = os.preadv(self._descriptors[location], [view[done:]], offset + done)
            if count == 0:
                raise TargetError(f"{location} ends before {name!r} does; export or copy the release again.")
            done += count
        return data


def _open(folder: Path, location: str, files: ExitStack) -> int:
    """Descriptor of a data file, which `files` will close."""
    if location in ("", ".", "..") or not {"/", "\0"}.isdisjoint(location):
        raise TargetError(
            f"The graph names {location!r:.80}, which is no file's name or leaves the release; do not use this release."
        )
    path = folder / location
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would keep us waiting
    except OSError as error:
        raise TargetError(
            f"{path} cannot be read ({error.strerror or error}); export or copy the release again."
        ) from error
    files.callback(os.close, descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise TargetError(f"{path} is not a regular file; export or copy the release again.")
    return descriptor


@dataclass(frozen=True)
class WrittenMatrix:
    """The arrays of a matrix of `rows` rows, by the form's names; `index`: of one out of several that are stacked.

    Arrays whose rows do not lie one after the other are held in memory from first use on.
    """

    graph: WrittenGraph
    form: Form
    places: Mapping[str, Place]
    rows: int
    index: int | None

    def read(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """What the form made of rows start to stop; raises TargetError as WrittenGraph.read."""
        return {name: self._slice(name, place.stored, start, stop) for name, place in self.places.items()}

    def _slice(self, name: str, stored: Stored, start: int, stop: int) -> NDArray[Any]:
        axis, shape = self.form.rows_axis(name), self._shape(stored)
        low, high = (edge * shape[axis] // self.rows for edge in (start, stop))
        if axis == 0:
            return self._read(name, low * prod(shape[1:]), (high - low, *shape[1:]))
        return self._held[name][(slice(None),) * axis + (slice(low, high),)]

    @cached_property
    def _held(self) -> dict[str, NDArray[Any]]:
        return {
            name: self._read(name, 0, self._shape(place.stored))
            for name, place in self.places.items()
            if self.form.rows_axis(name) != 0
        }

    def _read(self, name: str, first: int, shape: tuple[int, ...]) -> NDArray[Any]:
        """Elements of this matrix's array, from its `first` on."""
        place = self.places[name]
        base = (self.index or 0) * prod(self._shape(place.stored))
        return self.graph.read(place.name, place.stored, base + first, shape)

    def _shape(self, stored: Stored) -> tuple[int, ...]:
        """Of this matrix's array."""
        return stored.shape if self.index is None else stored.shape[1:]
