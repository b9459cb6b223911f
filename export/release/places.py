"""Where each initialiser lies in the data file: known before anything is read, so that disk and memory can be asked.

Weights follow each other in the order of the graph, a weight's arrays in the order of its form, each at a page.
Does not know how files are written or what the numbers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from export.errors import SourceError
from export.forms.form import Stored
from export.graphs.builder import Matrix, Table, Vector, View, Weight
from export.spec import TensorInfo


@dataclass(frozen=True)
class Place:
    """One initialiser: what it is, and at which byte of the data file it begins."""

    name: str
    stored: Stored
    offset: int

    @property
    def span(self) -> tuple[int, int]:
        """(offset, bytes without padding)."""
        return self.offset, self.stored.size_bytes

    def initialiser(self, data_file: str) -> TensorProto:
        """As it stands in the graph."""
        tensor = TensorProto(name=self.name, dims=self.stored.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = self.stored.tensor_type
        offset, length = self.span
        for key, value in (("location", data_file), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        return tensor


@dataclass(frozen=True)
class Layout:
    """The places of every weight's initialisers, by the weight's name, in file order."""

    places: Mapping[str, tuple[Place, ...]]
    size_bytes: int

    def initialisers(self, weights: Sequence[Weight], data_file: str) -> list[TensorProto]:
        """All of a graph, its views too: another shape over the very same bytes."""
        made = {place.name: place.initialiser(data_file) for places in self.places.values() for place in places}
        for weight in weights:
            if isinstance(weight, View):
                made[weight.name] = _view(weight, made[weight.of])
        return list(made.values())


def lay_out(weights: Sequence[Weight], tensors: Mapping[str, TensorInfo], page_bytes: int) -> Layout:
    """Give every weight its place; raises SourceError for a matrix that its form cannot hold."""
    places: dict[str, tuple[Place, ...]] = {}
    end = 0
    for weight in weights:
        made = []
        for name, stored in _stored(weight, tensors).items():
            made.append(Place(name, stored, end))
            end += -(-stored.size_bytes // page_bytes) * page_bytes
        if made:
            places[weight.name] = tuple(made)
    return Layout(places, end)


def _stored(weight: Weight, tensors: Mapping[str, TensorInfo]) -> dict[str, Stored]:
    match weight:
        case Matrix(name=name, form=form, experts=experts):
            rows = sum(tensors[tensor].rows for tensor in weight.tensors) // max(1, experts)
            try:
                arrays = form.stored(rows, tensors[weight.tensors[0]].columns)
            except ValueError as error:
                raise SourceError(
                    f"The tensor {weight.tensors[0]!r} cannot be stored as {form.label} ({error}); "
                    "choose another --recipe."
                ) from error
            stack = (experts,) if experts else ()
            return {
                f"{name}.{array}": Stored((*stack, *stored.shape), stored.dtype, stored.tensor_type)
                for array, stored in arrays.items()
            }
        case Vector(name=name, shape=shape, dtype=dtype):
            return {name: Stored(shape, dtype, helper.np_dtype_to_tensor_dtype(dtype))}
        case Table(name=name, values=values):
            return {name: Stored(values.shape, values.dtype, helper.np_dtype_to_tensor_dtype(np.dtype(values.dtype)))}
        case View():
            return {}


def _view(view: View, original: TensorProto) -> TensorProto:
    tensor = TensorProto()
    tensor.CopyFrom(original)
    tensor.name = view.name
    tensor.dims[:] = view.shape
    return tensor
