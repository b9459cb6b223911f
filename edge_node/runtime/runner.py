"""Runs graph ABI 1 on ONNX Runtime: the only module that imports it.

The KV cache (edge_node.runtime.pools) is one pool per layer and kind, [slots, kv_heads, context_tokens, head_dim].
past and present are bound to the same address, a view pool[lo:hi], so a step copies nothing: a chunk runs on
one slot, a decode batch on adjacent ones. Bindings of a range are made once and kept; a step rebinds
only the four small inputs and the logits.

Proven on CPU. The CUDA path is the same graph with the pools on the device and fp16 where the manifest
says so; it has **not been run on hardware** yet.
Does not know sequences, sampling or speech.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from core.manifest import Manifest
from edge_node.config import SPIN_US
from edge_node.engine.ladder import LADDER, VERIFIED_LENGTHS
from edge_node.engine.step import BLOCK_TOKENS, Chunk, Decode, Load, Logits, Move, Save, StepPlan, StepResult
from edge_node.runtime.pools import CudaRuntime, DevicePools, Geometry, HostPools, Pools

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is loaded
import onnxruntime as ort

Device: TypeAlias = Literal["cpu", "cuda"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
MOST_WANTED = VERIFIED_LENGTHS[-1]
"""The most positions of a chunk whose logits may be wanted: the longest draft that is verified at once."""

# What a warm-up runs, enough to interpolate the rest: chunks that read, and blocks that are copied.
_WARM_LENGTHS = (2, 32, 128)
_WARM_BLOCKS = 4
# A draft whose verification takes longer than this will not pay; longer ones are not even measured.
_SLOW_S = 1.0


class DeviceUnavailable(ConfigError):
    """ONNX Runtime cannot use the device that the configuration asks for; it would fall back silently."""

    code = "device_unavailable"


class Runner:
    """A loaded model and its KV pool. Not thread-safe; results are views that the next run overwrites."""

    def __init__(self, session: Any, manifest: Manifest, device: Device, pools: Pools) -> None:
        self._session = session
        self._device = device
        self._pools = pools
        self._geometry = pools.geometry
        kind = next(output.type for output in session.get_outputs() if output.name == "logits")
        # The chunk's rows, then those of the decode batch.
        self._logits = np.zeros(
            (MOST_WANTED + self._geometry.slots, manifest.vocab_size),
            np.float16 if kind == "tensor(float16)" else np.float32,
        )
        self._bindings: dict[tuple[int, int], Any] = {}

    @classmethod
    def open(
        cls,
        folder: Path,
        manifest: Manifest,
        device: Device,
        threads: int,
        slots: int,
        context_tokens: int,
        spin_us: int = SPIN_US,
        prefix_blocks: int = 0,
    ) -> Runner:
        """Load the graph of a verified release.

        spin_us: how long a thread waits awake for the next operator of a step, 0 = not at all.
        Raises DeviceUnavailable, and ConfigError for a context that the graph or a cache that memory cannot hold.
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
        options = _options(threads, spin_us)
        session = ort.InferenceSession(str(folder / manifest.graph), options, providers=[_PROVIDERS[device]])
        if session.get_providers()[0] != _PROVIDERS[device]:
            raise DeviceUnavailable(_unavailable(device))
        geometry = Geometry(manifest.kv, slots, context_tokens, prefix_blocks)
        pools = HostPools(geometry) if device == "cpu" else DevicePools(geometry, _cuda_runtime(), _device_zeros)
        return cls(session, manifest, device, pools)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan; its logits are float32 views or copies, valid until the next run.

        Raises ValueError for a copy outside the pools and for a chunk that wants more than MOST_WANTED logits.
        """
        if plan.chunk is not None and len(plan.chunk.wanted) > MOST_WANTED:
            raise ValueError(
                f"A chunk wants the logits of {len(plan.chunk.wanted)} positions, the runner has room for "
                f"{MOST_WANTED}; verify shorter drafts."
            )
        began = time.perf_counter()
        self._pools.copy([*plan.moves, *plan.loads])
        copied = time.perf_counter()
        decode_logits = None if plan.decode is None else self._decode(plan.decode)
        decoded = time.perf_counter()
        chunk_logits = None if plan.chunk is None else self._chunk(plan.chunk)
        read = time.perf_counter()
        self._pools.copy([*plan.saves])
        copy_s = copied - began + time.perf_counter() - read
        return StepResult(chunk_logits, decode_logits, read - decoded, decoded - copied, copy_s)

    def warm_up(self, speculation: bool = False) -> list[tuple[StepPlan, StepResult]]:
        """Touch every weight and run the usual shapes; what they cost, for Engine.learn.

        speculation: chunks that verify drafts as well. Writes into slots and blocks nobody holds yet, which is
        harmless: they are written before they are read.
        """
        measured: list[tuple[StepPlan, StepResult]] = []
        context_tokens, slots = self._geometry.context_tokens, self._geometry.slots
        for rows in (1, slots):
            decode = Decode(0, [0] * rows, [1] * rows, list(range(rows)))
            measured.append(self._measure(StepPlan(0, None, decode, 0.0)))
        for length in _WARM_LENGTHS:
            if length <= min(context_tokens, LADDER[-1]):
                measured.append(self._measure(StepPlan(0, Chunk(0, 0, [0] * length, []), None, 0.0)))
        for length in VERIFIED_LENGTHS if speculation else ():
            if length <= context_tokens:
                verified = Chunk(0, 0, [0] * length, list(range(length)))
                measured.append(self._measure(StepPlan(0, verified, None, 0.0)))
                if measured[-1][1].chunk_s > _SLOW_S:
                    break
        return measured + [self._measure(plan) for plan in self._copies()]

    def _copies(self) -> list[StepPlan]:
        """Each kind of copy that the pools have room for, alone."""
        plans: list[StepPlan] = []
        blocks = list(range(min(_WARM_BLOCKS, self._geometry.blocks, self._geometry.context_tokens // BLOCK_TOKENS)))
        if blocks:
            plans.append(StepPlan(0, None, None, 0.0, saves=[Save(0, 0, blocks)]))
            plans.append(StepPlan(0, None, None, 0.0, loads=[Load(0, blocks)]))
        if self._geometry.slots > 1:
            tokens = min(_WARM_BLOCKS * BLOCK_TOKENS, self._geometry.context_tokens)
            plans.append(StepPlan(0, None, None, 0.0, moves=[Move(0, 1, tokens)]))
        return plans

    def _measure(self, plan: StepPlan) -> tuple[StepPlan, StepResult]:
        self.run(plan)  # the first run of a shape allocates, and pages weights in
        return plan, self.run(plan)

    # -- one part of a step -----------------------------------------------------------------

    def _chunk(self, chunk: Chunk) -> Logits:
        ids = np.array([chunk.ids], np.int64)
        ends = np.array([chunk.start + len(chunk.ids)], np.int32)
        return self._run(chunk.slot, ids, ends, chunk.wanted, self._logits[: len(chunk.wanted)])

    def _decode(self, decode: Decode) -> Logits:
        ids = np.array(decode.ids, np.int64)[:, None]
        ends = np.array(decode.ends, np.int32)
        return self._run(
            decode.first_slot, ids, ends, decode.wanted, self._logits[MOST_WANTED : MOST_WANTED + len(decode.wanted)]
        )

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
            dtype = self._geometry.dtype.type
            for pool in range(self._geometry.pools):
                name = f"{'value' if pool % 2 else 'key'}.{pool // 2}"
                shape, address = self._pools.view(pool, lo, hi)
                binding.bind_input(f"past_{name}", self._device, 0, dtype, shape, address)
                binding.bind_output(f"present_{name}", self._device, 0, dtype, shape, address)
        return binding


def _device_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), "cuda", 0)


def _cuda_runtime() -> CudaRuntime:
    """The CUDA runtime that preload_dlls has loaded, by the name under which the loader knows it."""
    name = f"libcudart.so.{ort.cuda_version.split('.')[0]}"
    try:
        return CudaRuntime(ctypes.CDLL(name))
    except OSError as error:
        raise DeviceUnavailable(
            f"{name} cannot be loaded, which the KV cache on the GPU needs; install the extra edge-cuda, or set "
            'device = "cpu".'
        ) from error


def _options(threads: int, spin_us: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Patterns are kept per input shape; prompts have too many.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin_us else "0")
    if spin_us:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin_us))
        # Between steps nobody spins.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options


def _unavailable(device: Device) -> str:
    offered = ", ".join(ort.get_available_providers())
    return (
        f"The configuration asks for the device {device!r}, but this ONNX Runtime ({ort.__version__}) offers only "
        f'{offered}; install the extra edge-cuda and check the driver, or set device = "cpu".'
    )
