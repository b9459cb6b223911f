"""The operator edgechat.MoeMxfp4 spelt out in operators that ONNX Runtime has: its contract, executable.

Slow, and in the memory of the dequantised experts: for tiny models in tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from export.forms.values import MXFP4_BIAS, MXFP4_VALUES
from export.graphs.builder import EDGECHAT, MICROSOFT, OPSET

INPUTS = ("x", "scores", "codes_1", "scales_1", "bias_1", "codes_2", "scales_2", "bias_2")


def with_operator(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with the operator defined in it."""
    nodes = [
        _constant("fifteen", np.array(15, np.uint8)),
        _constant("four", np.array(4, np.uint8)),
        _constant("values", MXFP4_VALUES),
        _constant("bias", np.array(MXFP4_BIAS, np.float32)),
        _constant("two", np.array(2, np.float32)),
        _constant("last", np.array([-1], np.int64)),
        _constant("blocks", np.array([0, 0, 0, -1], np.int64)),
        _constant("rows", np.array([0, 0, -1], np.int64)),
        *_dequantise("1"),
        *_dequantise("2"),
        _mixture(),
    ]
    function = helper.make_function(
        EDGECHAT,
        "MoeMxfp4",
        INPUTS,
        ["y"],
        nodes,
        [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
        ["k", "limit", "alpha"],
    )
    defined = onnx.ModelProto()
    defined.CopyFrom(model)
    defined.functions.append(function)
    return defined


def _constant(name: str, value: NDArray[Any]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))


def _dequantise(which: str) -> list[onnx.NodeProto]:
    """codes [experts, rows, blocks, 16] and scales [experts, rows, blocks] -> weights [experts, rows, columns]."""

    def node(op: str, inputs: list[str], output: str, **attributes: int | str) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [f"{output}_{which}"], **attributes)

    def own(name: str) -> str:
        return f"{name}_{which}"

    return [
        node("BitwiseAnd", [own("codes"), "fifteen"], "even"),
        node("BitShift", [own("codes"), "four"], "odd", direction="RIGHT"),
        node("Unsqueeze", [own("even"), "last"], "evens"),
        node("Unsqueeze", [own("odd"), "last"], "odds"),
        node("Concat", [own("evens"), own("odds")], "pairs", axis=-1),
        node("Reshape", [own("pairs"), "blocks"], "nibbles"),
        node("Cast", [own("nibbles")], "indices", to=onnx.TensorProto.INT32),
        node("Gather", ["values", own("indices")], "magnitudes"),
        node("Cast", [own("scales")], "exponents", to=onnx.TensorProto.FLOAT),
        node("Sub", [own("exponents"), "bias"], "unbiased"),
        node("Pow", ["two", own("unbiased")], "powers"),
        node("Unsqueeze", [own("powers"), "last"], "each"),
        node("Mul", [own("magnitudes"), own("each")], "scaled"),
        node("Reshape", [own("scaled"), "rows"], "weights"),
    ]


def _mixture() -> onnx.NodeProto:
    mixture = helper.make_node(
        "MoE",
        ["x", "scores", "weights_1", "bias_1", "weights_2", "bias_2"],
        ["y"],
        domain=MICROSOFT,
        normalize_routing_weights=1,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_beta=1.0,
    )
    for name, own, kind in [
        ("k", "k", onnx.AttributeProto.INT),
        ("swiglu_limit", "limit", onnx.AttributeProto.FLOAT),
        ("activation_alpha", "alpha", onnx.AttributeProto.FLOAT),
    ]:
        mixture.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=own, type=kind))
    return mixture
