"""A graph under construction: nodes, and declarations of the weights that somebody will write later.

Weights are declared, not held: a release larger than memory is written tensor by tensor, and only the declarations
know which source tensors make up which initialiser. Does not know model families, recipes or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from export.forms.form import Form

MICROSOFT = "com.microsoft"
EDGECHAT = "edgechat"
"""Operators of our own: see docs/decisions/014."""

OPSET = 21
IR_VERSION = 10
IR_VERSION_WITH_E8M0 = 12
"""The first version that knows FLOAT8E8M0. Others are not written: an older runtime reads what it can."""


@dataclass(frozen=True)
class Matrix:
    """Matrix made of source tensors stacked by rows. Becomes `<name>.<array>` for each array of its form.

    experts > 0: one tensor [experts, rows, columns]; the form is that of one expert's matrix, and the initialisers are
    the experts' arrays stacked along a new first axis.
    """

    name: str
    tensors: tuple[str, ...]
    form: Form
    experts: int = 0


@dataclass(frozen=True)
class View:
    """Another shape for the very same bytes of the initialiser `of`."""

    name: str
    of: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Vector:
    """Floats of one or more source tensors joined end to end, in the given shape and type (float32 or float16)."""

    name: str
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Table:
    """Values that the exporter computed itself, in the type they will be stored in."""

    name: str
    values: NDArray[Any]

    @property
    def tensors(self) -> tuple[str, ...]:
        """No source tensors."""
        return ()


Weight = Matrix | View | Vector | Table


@dataclass
class GraphBuilder:
    """Collects nodes in execution order. Values are named after the node that makes them."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def node(
        self,
        op: str,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: int | float | str | list[int],
    ) -> str:
        """Append a node; returns its first output, which is `name` unless `outputs` says otherwise."""
        produced = list(outputs) or [name]
        self.nodes.append(helper.make_node(op, list(inputs), produced, name=name, domain=domain, **attributes))
        return produced[0]

    def weight(self, weight: Weight) -> str:
        """Declare a weight; returns its name."""
        self.weights.append(weight)
        return weight.name

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Add a small constant that lies in the graph file itself, once for each name."""
        if name not in self.constants:
            self.constants[name] = onnx.numpy_helper.from_array(values, name)
        return name

    def operators(self) -> list[str]:
        """What a runtime must have beside ONNX Runtime's own operators, as "domain.Operator", sorted."""
        return sorted({f"{node.domain}.{node.op_type}" for node in self.nodes if node.domain not in ("", MICROSOFT)})

    def build(self, name: str, initializers: Sequence[onnx.TensorProto], metadata: dict[str, str]) -> onnx.ModelProto:
        """The finished model; `initializers` are the declared weights as they were written."""
        graph = helper.make_graph(
            self.nodes, name, self.inputs, self.outputs, [*self.constants.values(), *initializers]
        )
        own = sorted({node.domain for node in self.nodes} - {"", MICROSOFT})
        opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in (MICROSOFT, *own))]
        has_e8m0 = any(tensor.data_type == onnx.TensorProto.FLOAT8E8M0 for tensor in initializers)
        ir_version = IR_VERSION_WITH_E8M0 if has_e8m0 else IR_VERSION
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="edgechat")
        helper.set_model_props(model, metadata)
        return model
