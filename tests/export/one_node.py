"""One node on ONNX Runtime's CPU: what an operator itself makes of our bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export.forms.form import Arrays, Form
from export.graphs.builder import IR_VERSION, MICROSOFT, OPSET

Array = NDArray[Any]


def initialiser(name: str, array: Array, tensor_type: int) -> onnx.TensorProto:
    """A tensor of a type that numpy may not have."""
    return TensorProto(
        name=name, data_type=tensor_type, dims=array.shape, raw_data=np.ascontiguousarray(array).tobytes()
    )


def initialisers(prefix: str, form: Form, arrays: Arrays, rows: int, columns: int) -> list[onnx.TensorProto]:
    """A form's arrays as `<prefix>.<array>`, in the types that it says they have."""
    stored = form.stored(rows, columns)
    return [initialiser(f"{prefix}.{name}", array, stored[name].tensor_type) for name, array in arrays.items()]


def open_node(
    operator: str,
    inputs: Sequence[str],
    weights: Sequence[onnx.TensorProto],
    feeds: Mapping[str, Array],
    **attributes: int | float | str,
) -> onnxruntime.InferenceSession:
    """A session over one com.microsoft node; its output has the type of the first float input or weight."""
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16}
    types = [*(info.type.tensor_type.elem_type for info in infos), *(tensor.data_type for tensor in weights)]
    output = helper.make_tensor_value_info("y", next(kind for kind in types if kind in floats), None)
    node = helper.make_node(operator, list(inputs), ["y"], domain=MICROSOFT, **attributes)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    graph = helper.make_graph([node], operator, infos, [output], list(weights))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_node(
    operator: str,
    inputs: Sequence[str],
    weights: Sequence[onnx.TensorProto],
    feeds: Mapping[str, Array],
    **attributes: int | float | str,
) -> Array:
    """The node's output."""
    session = open_node(operator, inputs, weights, feeds, **attributes)
    output: Array = session.run(None, dict(feeds))[0]
    return output
