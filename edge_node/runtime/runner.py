"""Runs graph ABI 1 on ONNX Runtime: the only module that imports it.

The KV cache is one pool per layer and kind, [slots, kv_heads, context_tokens, head_dim]. past and
present are bound to the same address, a view pool[lo:hi], so a step copies nothing: a chunk runs on
one slot, a decode batch on adjacent ones. Bindings of a range are made once and kept; a step rebinds
only the four small inputs and the logits.

Proven on CPU. The CUDA path is the same graph with the pools on the device and fp16 where the manifest
says so; it has **not been run on hardware** yet.
Does not know sequences, sampling or speech.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from core.manifest import KvShape, Manifest
from edge_node.engine.ladder import LADDER
from edge_node.engine.step import Chunk, Decode, Logits, StepPlan, StepResult

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is loaded
import onnxruntime as ort

Device: TypeAlias = Literal["cpu", "cuda"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Chunks that a warm-up runs: enough to interpolate the others' cost.
_WARM_LENGTHS = (2, 32, 128)


class DeviceUnavailable(ConfigError):
    """ONNX Runtime cannot use the device that the configuration asks for; it would fall back silently."""

    code = "device_unavailable"


class Runner:
    """A loaded model and its KV pool. Not thread-safe; results are views that the next run overwrites."""

    def __init__(self, session: Any, manifest: Manifest, device: Device, slots: int, context_tokens: int) -> None:
        self._session = session
        self._device = device
        self._slots = slots
        self._layers = manifest.kv.layers
        pool = _HostPool if device == "cpu" else _DevicePool
        self._pools: dict[str, _Pool] = {
            f"{kind}.{layer}": pool(manifest.kv, slots, context_tokens)
            for layer in range(manifest.kv.layers)
            for kind in ("key", "value")
        }
        kind = next(output.type for output in session.get_outputs() if output.name == "logits")
        # One row for a chunk, before those of the decode batch.
        self._logits = np.zeros(
            (1 + slots, manifest.vocab_size), np.float16 if kind == "tensor(float16)" else np.float32
        )
        self._bindings: dict[tuple[int, int], Any] = {}
        self._context_tokens = context_tokens

    @classmethod
    def open(
        cls,
        folder: Path,
        manifest: Manifest,
        device: Device,
        threads: int,
        slots: int,
        context_tokens: int,
        spinning: bool = False,
    ) -> Runner:
        """Load the graph of a verified release.

        spinning: threads wait for the next operator by burning their core; only for cores of one's
        own. Raises DeviceUnavailable, and ConfigError for a context the graph does not hold.
        """
        if not 2 <= context_tokens <= manifest.context_tokens:
            raise ConfigError(
                f"context_tokens is {context_tokens}; {manifest.release} holds 2 to {manifest.context_tokens}."
            )
        ort.disable_telemetry_events()
        if device == "cuda":
            ort.preload_dlls()
        if _PROVIDERS[device] not in ort.get_available_providers():
            raise DeviceUnavailable(_unavailable(device))
        options = _options(threads, spinning)
        session = ort.InferenceSession(str(folder / manifest.graph), options, providers=[_PROVIDERS[device]])
        if session.get_providers()[0] != _PROVIDERS[device]:
            raise DeviceUnavailable(_unavailable(device))
        return cls(session, manifest, device, slots, context_tokens)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan; its logits are float32 views or copies, valid until the next run."""
        began = time.perf_counter()
        decode_logits = None if plan.decode is None else self._decode(plan.decode)
        between = time.perf_counter()
        chunk_logits = None if plan.chunk is None else self._chunk(plan.chunk)
        return StepResult(chunk_logits, decode_logits, time.perf_counter() - between, between - began)

    def warm_up(self) -> list[tuple[StepPlan, StepResult]]:
        """Touch every weight and run the usual shapes; what they cost, for Engine.learn.

        Writes into slots nobody holds yet, which is harmless: positions are written before they are read.
        """
        measured: list[tuple[StepPlan, StepResult]] = []
        lengths = [length for length in _WARM_LENGTHS if length <= min(self._context_tokens, LADDER[-1])]
        for rows in (1, self._slots):
            decode = Decode(0, [0] * rows, [1] * rows, list(range(rows)))
            measured += self._measure(StepPlan(0, None, decode, 0.0))
        for length in lengths:
            measured += self._measure(StepPlan(0, Chunk(0, 0, [0] * length, []), None, 0.0))
        return measured

    def _measure(self, plan: StepPlan) -> list[tuple[StepPlan, StepResult]]:
        self.run(plan)  # the first run of a shape allocates, and pages weights in
        return [(plan, self.run(plan))]

    # -- one part of a step -----------------------------------------------------------------

    def _chunk(self, chunk: Chunk) -> Logits:
        ids = np.array([chunk.ids], np.int64)
        ends = np.array([chunk.start + len(chunk.ids)], np.int32)
        return self._run(chunk.slot, ids, ends, chunk.wanted, self._logits[: len(chunk.wanted)])

    def _decode(self, decode: Decode) -> Logits:
        ids = np.array(decode.ids, np.int64)[:, None]
        ends = np.array(decode.ends, np.int32)
        return self._run(decode.first_slot, ids, ends, decode.wanted, self._logits[1 : 1 + len(decode.wanted)])

    def _run(
        self, lo: int, ids: NDArray[np.int64], ends: NDArray[np.int32], wanted: list[int], out: NDArray[Any]
    ) -> Logits:
        binding = self._binding(lo, lo + len(ids))
        inputs = {
            "input_ids": ids,
            "seqlens_k": ends - np.int32(1),
            "total_length": np.array(ends.max(), np.int32),
            "logits_indices": np.array(wanted, np.int64),
        }
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits", "cpu", 0, out.dtype, out.shape, out.ctypes.data)
        self._session.run_with_iobinding(binding)
        return out.astype(np.float32, copy=False)

    def _binding(self, lo: int, hi: int) -> Any:
        """The range's binding, caches bound; made on first use (at most slots squared / 2 of them)."""
        binding = self._bindings.get((lo, hi))
        if binding is None:
            binding = self._bindings[lo, hi] = self._session.io_binding()
            for name, pool in self._pools.items():
                shape, address = pool.view(lo, hi)
                binding.bind_input(f"past_{name}", self._device, 0, pool.dtype, shape, address)
                binding.bind_output(f"present_{name}", self._device, 0, pool.dtype, shape, address)
        return binding


class _Pool(Protocol):
    """One layer's keys or values of all slots."""

    dtype: Any

    def view(self, lo: int, hi: int) -> tuple[tuple[int, ...], int]:
        """Shape and address of slots lo..hi."""
        ...


class _HostPool:
    """In main memory; untouched pages of zeros cost nothing until a slot grows into them."""

    def __init__(self, kv: KvShape, slots: int, context_tokens: int) -> None:
        self.dtype = np.dtype(kv.dtype).type
        self._array = np.zeros((slots, kv.kv_heads, context_tokens, kv.head_dim), self.dtype)

    def view(self, lo: int, hi: int) -> tuple[tuple[int, ...], int]:
        part = self._array[lo:hi]
        return part.shape, part.ctypes.data


class _DevicePool:
    """In the GPU's memory. Unproven on hardware."""

    def __init__(self, kv: KvShape, slots: int, context_tokens: int) -> None:
        self.dtype = np.dtype(kv.dtype).type
        self._shape = (kv.kv_heads, context_tokens, kv.head_dim)
        self._slot_bytes = int(np.prod(self._shape)) * np.dtype(kv.dtype).itemsize
        # From zeros, not from shape: garbage could be a NaN, which a mask times zero does not cancel.
        self._value = ort.OrtValue.ortvalue_from_numpy(np.zeros((slots, *self._shape), self.dtype), "cuda", 0)

    def view(self, lo: int, hi: int) -> tuple[tuple[int, ...], int]:
        return (hi - lo, *self._shape), self._value.data_ptr() + lo * self._slot_bytes


def _options(threads: int, spinning: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Patterns are kept per input shape; prompts have too many.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options


def _unavailable(device: Device) -> str:
    offered = ", ".join(ort.get_available_providers())
    return (
        f"The configuration asks for the device {device!r}, but this ONNX Runtime ({ort.__version__}) offers only "
        f'{offered}; install the extra edge-cuda and check the driver, or set device = "cpu".'
    )
