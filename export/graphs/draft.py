"""What every part of a graph is drawn from: the graph so far, the model's sizes and tensors, and the plan.

Does not know operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from onnx import helper

from export.forms.form import Form
from export.graphs.builder import GraphBuilder, Matrix, Vector
from export.recipes import Device, Plan, Recipe
from export.spec import DecoderSpec, Expected, TensorInfo, expected_tensors


@dataclass(frozen=True)
class Draft:
    """A graph under construction for one model and one plan; `tensors` are those of the checkpoint."""

    graph: GraphBuilder
    spec: DecoderSpec
    tensors: Mapping[str, TensorInfo]
    plan: Plan

    @property
    def floats(self) -> np.dtype[Any]:
        """The type of everything that flows through the graph, the cache and the logits included."""
        return self.plan.floats

    @property
    def accuracy_level(self) -> int:
        """How block-quantised products compute: 4 rounds activations to int8, 0 keeps them as they come.

        CUDA's kernels keep them whatever it says; on the CPU only an oracle can wait for that.
        """
        if self.plan.recipe.device is Device.CUDA or self.plan.recipe in (Recipe.FP32, Recipe.GGUF_PARITY):
            return 0
        return 4

    @cached_property
    def _expected(self) -> Mapping[str, Expected]:
        return expected_tensors(self.spec)

    def form(self, tensor: str) -> Form:
        """How the plan stores a tensor; raises SourceError if it has no form for it."""
        return self.plan.form(self.spec, self._expected[tensor].role, self.tensors[tensor].kind)

    def rows(self, matrix: Matrix) -> int:
        """Rows of the stacked tensors."""
        return sum(self.tensors[tensor].rows for tensor in matrix.tensors)

    def columns(self, matrix: Matrix) -> int:
        """Columns, which all stacked tensors share."""
        return self.tensors[matrix.tensors[0]].columns

    def matrix(self, name: str, tensors: tuple[str, ...], experts: int = 0) -> Matrix:
        """Declare tensors of one form as one matrix."""
        matrix = Matrix(name, tensors, self.form(tensors[0]), experts)
        self.graph.weight(matrix)
        return matrix

    def vector(self, name: str, tensors: tuple[str, ...], dtype: np.dtype[Any] | None = None) -> str:
        """Declare tensors as one vector (or tensor of biases, if there is but one), in the graph's type."""
        shapes = [self.tensors[tensor].shape for tensor in tensors]
        shape = shapes[0] if len(shapes) == 1 else (sum(size for (size,) in shapes),)
        return self.graph.weight(Vector(name, tensors, shape, dtype or self.floats))

    def cast(self, name: str, x: str, source: np.dtype[Any], target: np.dtype[Any], output: str = "") -> str:
        """`x` in another type, called `output`, by default as the node: no node if the types are the same."""
        if source == target:
            return x
        return self.graph.node("Cast", name, [x], [output or name], to=helper.np_dtype_to_tensor_dtype(target))


def path_of(name: str) -> str:
    """Weights are called layers.0.mlp.down, the nodes that use them /layers.0/mlp/down."""
    owner, _, rest = name.partition(".")
    if owner == "layers":
        index, _, rest = rest.partition(".")
        owner = f"layers.{index}"
    return "/" + "/".join([owner, *rest.split(".")]).rstrip("/")
