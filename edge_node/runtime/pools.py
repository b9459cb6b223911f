"""The KV cache in memory: slots that sequences run in, prefix blocks beside them, and the copies between the two.

    slots    [2 * layers, slots, kv_heads, context_tokens, head_dim]   a layer's keys, then its values: a binding each
    blocks   [blocks, 2 * layers, kv_heads, 64, head_dim]              a block is one stretch of memory

Positions are contiguous within a head, so a copy consists of stretches of 64 of them (16 KB on SmolLM2) and runs at
the speed of memory. On the host it is one assignment per block, and pages that were never written cost nothing.

HostPools are proven. DevicePools copy within the GPU through the CUDA runtime's cudaMemcpy2D; their arithmetic is
tested against a stand-in with the same contract, and they have **not been run on hardware** yet.
Does not know ONNX Runtime, sequences, or which block holds what.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError, ServiceError
from core.manifest import KvShape
from edge_node.engine.step import BLOCK_TOKENS, Load, Move, Save

Copy: TypeAlias = Move | Load | Save

_DEVICE_TO_DEVICE = 3  # cudaMemcpyKind


class DeviceCopyFailed(ServiceError):
    """The CUDA runtime reported an error; what the cache holds is unknown from then on."""


def blocks_within(kv: KvShape, budget_bytes: int) -> int:
    """How many prefix blocks a budget buys."""
    return budget_bytes // (kv.bytes_per_token * BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of the pools of one runner; context_tokens: positions of a slot."""

    kv: KvShape
    slots: int
    context_tokens: int
    blocks: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.kv.dtype)

    @property
    def pools(self) -> int:
        """One of keys and one of values for each layer."""
        return 2 * self.kv.layers

    @property
    def slots_shape(self) -> tuple[int, ...]:
        return (self.pools, self.slots, self.kv.kv_heads, self.context_tokens, self.kv.head_dim)

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        return (self.blocks, self.pools, self.kv.kv_heads, BLOCK_TOKENS, self.kv.head_dim)

    @property
    def total_bytes(self) -> int:
        return self.kv.bytes_per_token * (self.slots * self.context_tokens + self.blocks * BLOCK_TOKENS)

    def check(self, copy: Copy) -> None:
        """Raise ValueError for a copy beyond a pool, where a device holds something else, or of a slot onto itself."""
        blocks: list[int] = []
        match copy:
            case Move(source, target, tokens):
                slots, end = [source, target], tokens
            case Load(slot, blocks):
                slots, end = [slot], len(blocks) * BLOCK_TOKENS
            case Save(slot, first, blocks):
                slots, end = [slot], (first + len(blocks)) * BLOCK_TOKENS if first >= 0 else -1
        inside = all(0 <= slot < self.slots for slot in slots) and all(0 <= block < self.blocks for block in blocks)
        if not (inside and 0 <= end <= self.context_tokens and len(set(slots)) == len(slots)):
            raise ValueError(
                f"{copy} does not fit the pools of {self.slots} slots of {self.context_tokens} positions and "
                f"{self.blocks} blocks; please report this."
            )


class Pools(Protocol):
    """The keys and values of all layers."""

    geometry: Geometry

    def view(self, pool: int, lo: int, hi: int) -> tuple[tuple[int, ...], int]:
        """Shape and address of slots lo..hi of one pool, 2 * layer for keys and one more for values."""

    def copy(self, copies: list[Copy]) -> None:
        """Carry out copies in their order; they are done, in memory, on return. Raises ValueError, DeviceCopyFailed."""


class HostPools:
    """In main memory. Raises ConfigError where the machine cannot promise so much."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        try:
            self._slots: NDArray[Any] = np.zeros(geometry.slots_shape, geometry.dtype)
            self._blocks: NDArray[Any] = np.zeros(geometry.blocks_shape, geometry.dtype)
        except MemoryError as error:
            raise ConfigError(_too_large(geometry)) from error

    def view(self, pool: int, lo: int, hi: int) -> tuple[tuple[int, ...], int]:
        part = self._slots[pool, lo:hi]
        return part.shape, part.ctypes.data

    def copy(self, copies: list[Copy]) -> None:
        for copy in copies:
            self.geometry.check(copy)
            match copy:
                case Move(source, target, tokens):
                    # Pool by pool: for overlapping strides numpy would copy by way of a temporary.
                    for pool in self._slots:
                        pool[target, :, :tokens] = pool[source, :, :tokens]
                case Load(slot, blocks):
                    for at, block in enumerate(blocks):
                        self._slots[:, slot, :, _positions(at)] = self._blocks[block]
                case Save(slot, first, blocks):
                    for at, block in enumerate(blocks, first):
                        self._blocks[block] = self._slots[:, slot, :, _positions(at)]


class OnDevice(Protocol):
    """Memory of the GPU, freed with the object (an OrtValue)."""

    def data_ptr(self) -> int: ...


class CudaRuntime:
    """What the copies need of libcudart (CUDA Runtime API, memory management); takes the loaded library."""

    def __init__(self, library: Any) -> None:
        self._copy = library.cudaMemcpy2D
        self._copy.restype = ctypes.c_int
        # dst, dpitch, src, spitch, width, height, kind
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._copy.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int]
        self._synchronise = library.cudaDeviceSynchronize
        self._synchronise.restype, self._synchronise.argtypes = ctypes.c_int, []
        self._words = library.cudaGetErrorString
        self._words.restype, self._words.argtypes = ctypes.c_char_p, [ctypes.c_int]

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copy `rows` stretches of `width` bytes whose starts lie a pitch apart; may return before it is done."""
        self._check(self._copy(target, target_pitch, source, source_pitch, width, rows, _DEVICE_TO_DEVICE))

    def synchronise(self) -> None:
        """Wait for the copies: they run on the default stream, for which ONNX Runtime's own does not wait."""
        self._check(self._synchronise())

    def _check(self, code: int) -> None:
        if code != 0:
            words = (self._words(code) or b"no description").decode(errors="replace")
            raise DeviceCopyFailed(
                f"The GPU failed while it copied within the KV cache ({words}, CUDA error {code}); the engine must be "
                "started again, and if it comes back, look at the driver's log."
            )


class DevicePools:
    """In the GPU's memory, laid out as on the host. Unproven on hardware.

    zeros: makes device memory of a shape. Slots start as zeros, since garbage could be a NaN, which a mask times zero
    does not cancel.
    """

    def __init__(
        self,
        geometry: Geometry,
        runtime: CudaRuntime,
        zeros: Callable[[tuple[int, ...], np.dtype[Any]], OnDevice],
    ) -> None:
        self.geometry = geometry
        self._runtime = runtime
        kv = geometry.kv
        self._position_bytes = kv.head_dim * geometry.dtype.itemsize
        self._head_bytes = geometry.context_tokens * self._position_bytes
        self._slot_bytes = kv.kv_heads * self._head_bytes
        self._block_head_bytes = BLOCK_TOKENS * self._position_bytes
        self._block_pool_bytes = kv.kv_heads * self._block_head_bytes
        self._slots = zeros(geometry.slots_shape, geometry.dtype)
        self._blocks = zeros(geometry.blocks_shape, geometry.dtype) if geometry.blocks else None

    def view(self, pool: int, lo: int, hi: int) -> tuple[tuple[int, ...], int]:
        return (hi - lo, *self.geometry.slots_shape[2:]), self._in_slot(pool, lo, 0)

    def copy(self, copies: list[Copy]) -> None:
        for copy in copies:
            self.geometry.check(copy)
            for pool in range(self.geometry.pools):
                match copy:
                    case Move(source, target, tokens):
                        self._move(pool, source, target, tokens)
                    case Load(slot, blocks):
                        for at, block in enumerate(blocks):
                            self._load(pool, slot, at, block)
                    case Save(slot, first, blocks):
                        for at, block in enumerate(blocks, first):
                            self._save(pool, slot, at, block)
        if copies:
            self._runtime.synchronise()

    def _move(self, pool: int, source: int, target: int, tokens: int) -> None:
        apart, width = self._head_bytes, tokens * self._position_bytes
        self._rows(self._in_slot(pool, target, 0), apart, self._in_slot(pool, source, 0), apart, width)

    def _load(self, pool: int, slot: int, at: int, block: int) -> None:
        there, here, width = self._in_slot(pool, slot, at), self._in_block(pool, block), self._block_head_bytes
        self._rows(there, self._head_bytes, here, width, width)

    def _save(self, pool: int, slot: int, at: int, block: int) -> None:
        there, here, width = self._in_block(pool, block), self._in_slot(pool, slot, at), self._block_head_bytes
        self._rows(there, width, here, self._head_bytes, width)

    def _rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int) -> None:
        """One row per head."""
        self._runtime.copy_rows(target, target_pitch, source, source_pitch, width, self.geometry.kv.kv_heads)

    def _in_slot(self, pool: int, slot: int, at: int) -> int:
        """Address of the first head's positions from BLOCK_TOKENS * at on."""
        slots = self.geometry.slots
        return self._slots.data_ptr() + (pool * slots + slot) * self._slot_bytes + at * self._block_head_bytes

    def _in_block(self, pool: int, block: int) -> int:
        if self._blocks is None:
            raise ValueError("There are no prefix blocks to copy; please report this.")
        return self._blocks.data_ptr() + (block * self.geometry.pools + pool) * self._block_pool_bytes


def _positions(at: int) -> slice:
    return slice(at * BLOCK_TOKENS, (at + 1) * BLOCK_TOKENS)


def _too_large(geometry: Geometry) -> str:
    return (
        f"The KV cache of {geometry.slots} slots of {geometry.context_tokens} tokens and {geometry.blocks} prefix "
        f"blocks takes {geometry.total_bytes / 1e9:.1f} GB, which this machine does not have; lower engine.slots, "
        "engine.context_tokens or engine.kv_cache_bytes."
    )
