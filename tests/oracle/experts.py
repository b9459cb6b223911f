"""What an exporter made of a GPT-OSS checkpoint's expert weights: MXFP4 values before, QMoE's values after.

Reads any graph with QMoE nodes of integer or fp4 weights in the operator's raw layout, whoever wrote it. The formats
are spelt out here once more, so that this shares no mistake with an exporter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors import safe_open

Values = NDArray[np.float32]

BLOCK = 32
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass(frozen=True)
class Change:
    """Share of the values that are not what they were, and the root mean square of the error over theirs."""

    changed: float
    relative: float


def change_of_experts(checkpoint: Path, graph: Path, experts: Sequence[int]) -> Change | None:
    """Compare the named experts of all layers; None if the graph has no QMoE."""
    count = changed = 0
    error = size = 0.0
    release = _Initialisers(graph)
    nodes = [node for node in release.model.graph.node if node.op_type == "QMoE"]
    for layer, node in enumerate(nodes):
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        for projection, weights, scales in (("gate_up_proj", *node.input[2:4]), ("down_proj", *node.input[5:7])):
            before = _checkpoint_values(checkpoint, f"model.layers.{layer}.mlp.experts.{projection}", experts)
            after = _release_values(release.array(weights), release.array(scales), attributes, experts)
            for old, new in zip(before, after, strict=True):
                difference = (new - old).astype(np.float64)
                count += old.size
                changed += int(np.count_nonzero(difference))
                error += float((difference**2).sum())
                size += float((old.astype(np.float64) ** 2).sum())
    return Change(changed / count, sqrt(error / size)) if nodes else None


def _checkpoint_values(checkpoint: Path, name: str, experts: Sequence[int]) -> Iterator[Values]:
    files = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    for expert in experts:
        blocks, exponents = (
            _rows(checkpoint / files[tensor], tensor, expert) for tensor in (f"{name}_blocks", f"{name}_scales")
        )
        codes = _nibbles(blocks.reshape(len(blocks), -1))
        yield _scaled(FP4[codes], np.exp2(exponents.astype(np.float32) - 127))


def _rows(file: Path, tensor: str, expert: int) -> NDArray[Any]:
    with safe_open(file, "np") as reader:
        result: NDArray[Any] = reader.get_slice(tensor)[expert : expert + 1][0]
    return result


def _release_values(
    weights: NDArray[Any], scales: NDArray[Any], attributes: dict[str, Any], experts: Sequence[int]
) -> Iterator[Values]:
    for expert in experts:
        packed, scale = np.asarray(weights[expert]), np.asarray(scales[expert])
        if attributes.get("quant_type") == b"fp4":  # columns before rows, two rows a byte
            yield _scaled(FP4[_nibbles(packed).T], np.exp2(scale.astype(np.float32) - 127))
        elif attributes["expert_weight_bits"] == 4:
            yield _scaled(_nibbles(packed).astype(np.float32) - 8, scale.astype(np.float32))
        else:
            yield _scaled(packed.astype(np.float32) - 128, scale.astype(np.float32))


def _nibbles(packed: NDArray[Any]) -> NDArray[Any]:
    """Low nibble first: twice as many along the last axis."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def _scaled(values: Values, scales: Values) -> Values:
    """One scale for each block of a row."""
    rows, blocks = scales.shape
    result: Values = (values.reshape(rows, blocks, -1) * scales[..., None]).reshape(rows, -1)
    return result


class _Initialisers:
    """A graph's initialisers, read from its data file only as far as they are looked at."""

    def __init__(self, graph: Path) -> None:
        self.model = onnx.load(graph, load_external_data=False)
        self._folder = graph.parent
        self._tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def array(self, name: str) -> NDArray[Any]:
        tensor = self._tensors[name]
        where = {entry.key: entry.value for entry in tensor.external_data}
        # FLOAT8E8M0 is a bare exponent, wanted as the byte it is.
        is_byte = tensor.data_type in (onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT8E8M0)
        dtype = np.uint8 if is_byte else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        path, offset = self._folder / where["location"], int(where.get("offset", 0))
        return np.memmap(path, dtype, "r", offset, tuple(tensor.dims))
