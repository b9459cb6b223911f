"""Checks on a release that has just been written, from its files alone.

`check_weights` reads every initialiser back through the graph's own offsets and compares it with the source;
`measure_invariance` runs the graph. The only module of `export` that knows onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import external_data_helper, helper

from export import claims, layouts
from export.errors import SourceError
from export.gguf import GgufFile, read_matrix
from export.llama_spec import LlamaSpec
from export.onnx_graph import Matrix, Table, Vector, View, Weight
from export.quantize import Floats
from export.recipes import Recipe

_SLOTS = 8
_PROMPT_TOKENS = 48
_CHUNKS_TOKENS = (2, 3, 8, 16, 48)  # each divides the prompt: no chunk of one token is ever read


@dataclass(frozen=True)
class WrittenRelease:
    """The initialisers of a graph on disk, each mapped on demand."""

    folder: Path
    graph: Path
    initializers: Mapping[str, onnx.TensorProto]

    @classmethod
    def open(cls, folder: Path, graph: str) -> WrittenRelease:
        """Read the graph, not the weights."""
        model = onnx.load(folder / graph, load_external_data=False)
        return cls(folder, folder / graph, {tensor.name: tensor for tensor in model.graph.initializer})

    def array(self, name: str) -> NDArray[Any]:
        """One initialiser's values, mapped from the data file."""
        tensor = self.initializers[name]
        place = external_data_helper.ExternalDataInfo(tensor)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.memmap(self.folder / place.location, dtype, "r", place.offset, tuple(tensor.dims))


def check_weights(
    written: WrittenRelease,
    weights: Sequence[Weight],
    recipe: Recipe,
    source: GgufFile,
) -> None:
    """Compare every weight with its source; raises SourceError naming the first that broke the recipe's claim."""
    for weight in weights:
        match weight:
            case Matrix(name=name, block_format=block_format):
                layout = layouts.layout_type(block_format, recipe)
                stored = {part: written.array(f"{name}.{part}") for part in layouts.array_names(layout)}
                claims.check(name, read_matrix(weight, source), layout(bits=block_format.bits, **stored))
            case View(name=name, of=of):
                _check_equal(name, written.array(name).reshape(-1), written.array(of).reshape(-1))
            case Vector(name=name, tensor=tensor):
                _check_equal(name, written.array(name), source.floats(tensor))
            case Table(name=name, values=values):
                _check_equal(name, written.array(name), values)


def _check_equal(name: str, written: NDArray[Any], source: NDArray[Any]) -> None:
    if not np.array_equal(written, source):
        raise SourceError(f"The weight {name!r} was not written as it stands in the source; the disk may be failing.")


@dataclass(frozen=True)
class Invariance:
    """Whether the way positions are grouped leaves no trace, bit for bit, on this machine's processor.

    chunks: a prompt's caches and logits are the same for all chunk lengths of two tokens or more.
    batches: a decoded token's are the same alone and among others.
    """

    chunks: bool
    batches: bool


def measure_invariance(written: WrittenRelease, spec: LlamaSpec) -> Invariance:
    """Run the graph on what must come out equal.

    One prompt is read in chunks of several lengths: caches and logits must be equal. Then eight sequences of different
    lengths decode one token each, alone and as one batch: logits and caches must be equal.
    """
    if spec.context_tokens < _PROMPT_TOKENS:
        raise SourceError(
            f"The model has a context of {spec.context_tokens} tokens; a release needs at least {_PROMPT_TOKENS}."
        )
    # onnxruntime leaves a thread that ran it rounding denormals to zero: that must not follow our caller home.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_measure, written, spec).result()


def _measure(written: WrittenRelease, spec: LlamaSpec) -> Invariance:
    runner = _Runner(written.graph, spec)
    prompt = np.arange(_PROMPT_TOKENS, dtype=np.int64) * 7919 % spec.vocab
    logits, caches = [], []
    for chunk in _CHUNKS_TOKENS:
        runner.clear()
        logits.append(runner.read(prompt, chunk))
        caches.append(runner.snapshot())
    chunks = all(_same_bits(values[0], other) for values in (logits, caches) for other in values[1:])
    del caches
    runner.copy_first_slot()
    lengths = np.arange(1, _SLOTS + 1, dtype=np.int32) * (_PROMPT_TOKENS // _SLOTS)
    tokens = prompt[lengths - 1]
    alone = [runner.step(slot, tokens[slot : slot + 1, None], lengths[slot : slot + 1]) for slot in range(_SLOTS)]
    cache = runner.snapshot()
    together = runner.step(0, tokens[:, None], lengths)
    batches = _same_bits(np.concatenate(alone), together) and _same_bits(cache, runner.snapshot())
    return Invariance(chunks, batches)


def _same_bits(first: Floats, second: Floats) -> bool:
    return first.shape == second.shape and first.tobytes() == second.tobytes()


@dataclass
class _Runner:
    """The graph with a cache of `_SLOTS` sequences bound in place."""

    graph: Path
    spec: LlamaSpec
    session: onnxruntime.InferenceSession = field(init=False)
    pool: Floats = field(init=False)

    def __post_init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        # On shared cores a spinning thread takes the time of the one it waits for.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])
        spec = self.spec
        self.pool = np.zeros((2 * spec.layers, _SLOTS, spec.kv_heads, _PROMPT_TOKENS, spec.head_dim), np.float32)

    def clear(self) -> None:
        self.pool[:] = 0

    def snapshot(self) -> Floats:
        return self.pool.copy()

    def copy_first_slot(self) -> None:
        self.pool[:, 1:] = self.pool[:, :1]

    def read(self, prompt: NDArray[np.int64], chunk_tokens: int) -> Floats:
        """Prefill slot 0; returns the logits of the last two positions."""
        for start in range(0, len(prompt), chunk_tokens):
            ids = prompt[None, start : start + chunk_tokens]
            end = np.array([start + chunk_tokens], np.int32)
            logits = self.step(0, ids, end, wanted=np.arange(chunk_tokens - 2, chunk_tokens))
        return logits

    def step(
        self, slot: int, ids: NDArray[np.int64], lengths: NDArray[np.int32], wanted: NDArray[np.int64] | None = None
    ) -> Floats:
        """Run adjacent slots from `slot` on; lengths [b] after this step; returns logits of `wanted`, default all."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        binding.bind_cpu_input("seqlens_k", lengths - 1)
        binding.bind_cpu_input("total_length", np.array(lengths.max(), np.int32))
        binding.bind_cpu_input("logits_indices", np.arange(ids.size) if wanted is None else wanted)
        for index, cache in enumerate(self.pool):
            kind, view = ("key", "value")[index % 2], cache[slot : slot + len(ids)]
            place = ("cpu", 0, np.float32, view.shape, view.ctypes.data)
            binding.bind_input(f"past_{kind}.{index // 2}", *place)
            binding.bind_output(f"present_{kind}.{index // 2}", *place)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        # Only the logits are fetched: they are the last output bound.
        return np.array(binding.get_outputs()[-1].numpy())
