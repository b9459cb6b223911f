"""Run graphs: written ones plainly, and ones that are still declarations, their weights encoded in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from core.manifest import KvShape
from export.forms.values import Doubles
from export.graphs.builder import Matrix, Table, Vector, View, Weight
from export.graphs.families import build_graph
from export.recipes import Dense, Plan, Recipe
from export.sources.checkpoint import Checkpoint
from export.spec import DecoderSpec, TensorInfo

ROWS_AT_ONCE = 48
"""Rows of a matrix that are encoded together: few, so that slices are joined on the way."""


def logits_of(graph: Path, kv: KvShape, ids: list[int]) -> Doubles:
    """Logits [len(ids), vocab] of all positions of a written graph, read in one chunk, everything a numpy feed.

    Runs in a thread of its own, since onnxruntime leaves its thread rounding denormals to zero.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_run, graph, kv, ids).result()


def _run(graph: Path, kv: KvShape, ids: list[int]) -> Doubles:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feeds = {
        "input_ids": np.array([ids], np.int64),
        "seqlens_k": np.array([len(ids) - 1], np.int32),
        "total_length": np.array(len(ids), np.int32),
        "logits_indices": np.arange(len(ids)),
    }
    for layer in range(kv.layers):
        for kind in ("key", "value"):
            feeds[f"past_{kind}.{layer}"] = np.zeros((1, kv.kv_heads, len(ids), kv.head_dim), np.float32)
    logits: Doubles = session.run(["logits"], feeds)[0].astype(np.float64)
    return logits


def log_softmax(logits: Doubles) -> Doubles:
    """Logarithms of probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: Doubles = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def export_in_memory(checkpoint: Checkpoint, recipe: Recipe, dense: Dense = Dense.INT8) -> onnx.ModelProto:
    """The model that a recipe makes of a small checkpoint, weights and all."""
    graph = build_graph(checkpoint.spec, checkpoint.tensors, Plan(recipe, dense))
    initializers: dict[str, onnx.TensorProto] = {}
    for weight in graph.weights:
        for tensor in _initializers(weight, checkpoint, initializers):
            initializers[tensor.name] = tensor
    return graph.build(checkpoint.spec.family, list(initializers.values()), {})


def _initializers(
    weight: Weight, checkpoint: Checkpoint, written: dict[str, onnx.TensorProto]
) -> list[onnx.TensorProto]:
    match weight:
        case Matrix():
            return _matrix(weight, checkpoint)
        case View(name=name, of=of, shape=shape):
            return [_tensor(name, written[of].data_type, shape, written[of].raw_data)]
        case Vector(name=name, tensors=tensors, shape=shape, dtype=dtype):
            parts = [_read(checkpoint, tensor).reshape(-1) for tensor in tensors]
            values = np.concatenate(parts).astype(dtype).reshape(shape)
            return [_tensor(name, helper.np_dtype_to_tensor_dtype(dtype), shape, values.tobytes())]
        case Table(name=name, values=values):
            return [onnx.numpy_helper.from_array(values, name)]


def _read(checkpoint: Checkpoint, tensor: str) -> Doubles:
    return checkpoint.read(tensor, 0, checkpoint.tensors[tensor].rows).to_doubles()


def decoded_weights(checkpoint: Checkpoint, recipe: Recipe, dense: Dense = Dense.INT8) -> dict[str, Doubles]:
    """What a recipe makes of each matrix's tensors, as numbers [rows, columns], by the checkpoint's names."""
    decoded: dict[str, Doubles] = {}
    for weight in build_graph(checkpoint.spec, checkpoint.tensors, Plan(recipe, dense)).weights:
        if isinstance(weight, Matrix):
            parts = _parts(weight, checkpoint)
            whole = np.concatenate([weight.form.decode(arrays) for arrays in parts])
            ends = np.cumsum([checkpoint.tensors[tensor].rows for tensor in weight.tensors])
            decoded |= dict(zip(weight.tensors, np.split(whole, ends[:-1]), strict=True))
    return decoded


def _parts(matrix: Matrix, checkpoint: Checkpoint) -> list[dict[str, NDArray[Any]]]:
    """The arrays of each expert, or those of the one matrix."""
    infos = [checkpoint.tensors[tensor] for tensor in matrix.tensors]
    count = max(matrix.experts, 1)
    rows = sum(info.rows for info in infos) // count
    return [_encoded(matrix, checkpoint, infos, index * rows, rows) for index in range(count)]


def _matrix(matrix: Matrix, checkpoint: Checkpoint) -> list[onnx.TensorProto]:
    parts = _parts(matrix, checkpoint)
    arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]} if matrix.experts else parts[0]
    infos = [checkpoint.tensors[tensor] for tensor in matrix.tensors]
    rows = sum(info.rows for info in infos) // len(parts)
    kinds = matrix.form.stored(rows, infos[0].columns)
    assert {name: array.shape[-len(kinds[name].shape) :] for name, array in arrays.items()} == {
        name: kind.shape for name, kind in kinds.items()
    }
    return [
        _tensor(f"{matrix.name}.{name}", kinds[name].tensor_type, array.shape, array.tobytes())
        for name, array in arrays.items()
    ]


def _encoded(
    matrix: Matrix, checkpoint: Checkpoint, infos: list[TensorInfo], first: int, rows: int
) -> dict[str, NDArray[Any]]:
    """Arrays of all rows of several tensors, or of some rows of one, slice by slice."""
    arrays: dict[str, list[NDArray[Any]]] = defaultdict(list)
    for info in infos:
        stop = min(info.rows, first + rows)
        for start in range(first, stop, ROWS_AT_ONCE):
            values = checkpoint.read(info.name, start, min(start + ROWS_AT_ONCE, stop))
            for name, array in matrix.form.encode(values).items():
                arrays[name].append(array)
    return {name: np.concatenate(parts, axis=matrix.form.rows_axis(name)) for name, parts in arrays.items()}


def _tensor(name: str, tensor_type: int, shape: Sequence[int], raw: bytes) -> onnx.TensorProto:
    return helper.make_tensor(name, tensor_type, shape, raw, raw=True)


def without_int8_activations(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, its products computed in floats: what is left is the arithmetic of the weights' forms."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    return changed


@dataclass
class Runner:
    """A model in memory with a cache of `slots` sequences of `capacity` tokens, bound in place."""

    model: onnx.ModelProto
    spec: DecoderSpec
    capacity: int
    slots: int = 1
    session: onnxruntime.InferenceSession = field(init=False)
    pool: NDArray[Any] = field(init=False)

    def __post_init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = False
        options.intra_op_num_threads = 1
        raw = self.model.SerializeToString()
        self.session = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        self.clear()

    @property
    def floats(self) -> np.dtype[Any]:
        """The type of the cache and the logits."""
        return np.dtype(np.float16 if self.session.get_outputs()[0].type == "tensor(float16)" else np.float32)

    def clear(self) -> None:
        """Empty all slots: what lies behind a sequence must not matter, so it is no number."""
        shape = (2 * self.spec.layers, self.slots, self.spec.kv_heads, self.capacity, self.spec.head_dim)
        self.pool = np.full(shape, np.nan, self.floats)

    def read(self, ids: Sequence[int], chunks: Sequence[int] = (), slot: int = 0) -> NDArray[Any]:
        """Logits [len(ids), vocab] of a prompt read in chunks of these lengths, by default in one."""
        logits, done = [], 0
        for count in chunks or [len(ids)]:
            chunk = np.array([ids[done : done + count]], np.int64)
            done += count
            logits.append(self.step(slot, chunk, [done]))
        assert done == len(ids)
        return np.concatenate(logits)

    def step(
        self, slot: int, ids: NDArray[np.int64], lengths: Sequence[int], wanted: Sequence[int] | None = None
    ) -> NDArray[Any]:
        """Run adjacent slots from `slot` on; lengths [b] after this step; returns logits of `wanted`, default all."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("seqlens_k", np.array(lengths, np.int32) - np.int32(1))
        binding.bind_cpu_input("total_length", np.array(max(lengths), np.int32))
        binding.bind_cpu_input("logits_indices", np.arange(ids.size) if wanted is None else np.array(wanted, np.int64))
        for index, cache in enumerate(self.pool):
            kind, view = ("key", "value")[index % 2], cache[slot : slot + len(ids)]
            place = ("cpu", 0, self.floats.type, view.shape, view.ctypes.data)
            binding.bind_input(f"past_{kind}.{index // 2}", *place)
            binding.bind_output(f"present_{kind}.{index // 2}", *place)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        return np.array(binding.get_outputs()[-1].numpy())
