"""Copies within the KV cache: every position of every layer and head goes where it belongs, and nothing else moves."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import ConfigError
from core.manifest import KvShape
from edge_node.engine.step import BLOCK_TOKENS, Load, Move, Save
from edge_node.runtime.pools import (
    Copy,
    CudaRuntime,
    DeviceCopyFailed,
    DevicePools,
    Geometry,
    HostPools,
    Pools,
    blocks_within,
)
from tests.edge_node.fake_cudart import FakeCudart

KV = KvShape(3, 2, 4, "float32")
# A context that is no whole number of blocks.
GEOMETRY = Geometry(KV, slots=3, context_tokens=200, blocks=5)
WHOLE_BLOCKS = GEOMETRY.context_tokens // BLOCK_TOKENS


def open_pools(kind: str, geometry: Geometry = GEOMETRY) -> Pools:
    fake = FakeCudart()
    return HostPools(geometry) if kind == "host" else DevicePools(geometry, CudaRuntime(fake), fake.zeros)


def slots_of(pools: Pools) -> list[NDArray[Any]]:
    """What ONNX Runtime would be bound to: one array per layer and kind."""
    arrays = []
    for pool in range(pools.geometry.pools):
        shape, address = pools.view(pool, 0, pools.geometry.slots)
        dtype = pools.geometry.dtype
        count = int(np.prod(shape))
        raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
        arrays.append(np.frombuffer(memoryview(raw), dtype).reshape(shape))
    return arrays


def fill(pools: Pools) -> NDArray[Any]:
    """Give every number of every slot a value of its own; return them all, [pools, slots, heads, positions, d]."""
    values = np.arange(np.prod(pools.geometry.slots_shape)).astype(pools.geometry.dtype)
    values = values.reshape(pools.geometry.slots_shape)
    for pool, array in zip(values, slots_of(pools), strict=True):
        array[...] = pool
    return values


class Model:
    """The same cache, position by position."""

    def __init__(self, slots: NDArray[Any], blocks: int) -> None:
        self.slots = slots.copy()
        self.blocks = np.zeros((blocks, BLOCK_TOKENS, *(slots.shape[0], slots.shape[2], slots.shape[4])), slots.dtype)

    def copy(self, copy: Copy) -> None:
        match copy:
            case Move(source, target, tokens):
                for position in range(tokens):
                    self.slots[:, target, :, position] = self.slots[:, source, :, position]
            case Load(slot, blocks):
                for position in range(len(blocks) * BLOCK_TOKENS):
                    at, within = divmod(position, BLOCK_TOKENS)
                    self.slots[:, slot, :, position] = self.blocks[blocks[at], within]
            case Save(slot, first, blocks):
                for position in range(len(blocks) * BLOCK_TOKENS):
                    at, within = divmod(position, BLOCK_TOKENS)
                    self.blocks[blocks[at], within] = self.slots[:, slot, :, first * BLOCK_TOKENS + position]


@st.composite
def copies(draw: st.DrawFn) -> Copy:
    slot = st.integers(0, GEOMETRY.slots - 1)
    kind = draw(st.sampled_from(["move", "load", "save"]))
    if kind == "move":
        source, target = draw(st.permutations(range(GEOMETRY.slots)))[:2]
        return Move(source, target, draw(st.integers(1, GEOMETRY.context_tokens)))
    first = draw(st.integers(0, WHOLE_BLOCKS)) if kind == "save" else 0
    numbers = st.lists(st.integers(0, GEOMETRY.blocks - 1), max_size=WHOLE_BLOCKS - first, unique=True)
    return Save(draw(slot), first, draw(numbers)) if kind == "save" else Load(draw(slot), draw(numbers))


@pytest.mark.parametrize("kind", ["host", "device"])
@given(batches=st.lists(st.lists(copies(), max_size=5), max_size=4))
def test_any_copies_in_any_order_do_what_copying_each_position_does(kind: str, batches: list[list[Copy]]) -> None:
    pools = open_pools(kind)
    model = Model(fill(pools), GEOMETRY.blocks)
    for batch in batches:
        pools.copy(batch)
        for copy in batch:
            model.copy(copy)
        assert np.array_equal(np.stack(slots_of(pools)), model.slots)


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_was_saved_is_loaded_into_every_layer_and_head_and_nowhere_else(kind: str, dtype: Any) -> None:
    pools = open_pools(kind, Geometry(KvShape(3, 2, 4, dtype), 3, 200, 5))
    fill(pools)
    slots = np.stack(slots_of(pools))
    pools.copy([Save(0, 1, [4, 2])])
    for array in slots_of(pools):
        array[:2] = np.nan
    pools.copy([Load(1, [4, 2])])
    found = np.stack(slots_of(pools))
    assert np.array_equal(found[:, 1, :, :128], slots[:, 0, :, 64:192])
    assert np.isnan(found[:, 1, :, 128:]).all() and np.isnan(found[:, 0]).all()
    assert np.array_equal(found[:, 2], slots[:, 2])


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize(
    "copy",
    [
        Move(0, 3, 1),
        Move(-1, 0, 1),
        Move(0, 1, 201),
        Move(0, 1, -1),
        Move(1, 1, 8),
        Load(0, [5]),
        Load(0, [-1]),
        Load(0, [0, 1, 2, 3]),
        Save(3, 0, [0]),
        Save(0, 2, [0, 1]),
        Save(0, -1, [0]),
    ],
)
def test_a_copy_beyond_the_pools_or_onto_itself_is_refused(kind: str, copy: Copy) -> None:
    pools = open_pools(kind)
    before = fill(pools)
    with pytest.raises(ValueError, match="does not fit the pools of 3 slots of 200 positions and 5 blocks"):
        pools.copy([copy])
    assert np.array_equal(np.stack(slots_of(pools)), before)


@pytest.mark.parametrize("kind", ["host", "device"])
def test_pools_without_blocks_have_slots_all_the_same(kind: str) -> None:
    pools = open_pools(kind, Geometry(KV, 2, 64, 0))
    before = fill(pools)
    pools.copy([Move(0, 1, 64), Load(0, [])])
    assert np.array_equal(np.stack(slots_of(pools))[:, 1], before[:, 0])


def test_a_part_of_the_slots_is_a_view_of_the_whole() -> None:
    for kind in ("host", "device"):
        pools = open_pools(kind)
        (_, whole), (shape, part) = pools.view(4, 0, 3), pools.view(4, 1, 3)
        assert shape == (2, 2, 200, 4) and part - whole == 2 * 200 * 4 * 4


def test_a_copy_on_the_device_is_one_call_per_layer_and_kind() -> None:
    fake = FakeCudart()
    pools = DevicePools(GEOMETRY, CudaRuntime(fake), fake.zeros)
    pools.copy([Move(0, 1, 100)])
    assert fake.copies == 6
    pools.copy([Save(0, 0, [1, 2])])
    assert fake.copies == 6 + 12


def test_an_error_of_the_cuda_runtime_is_one_sentence_with_its_number() -> None:
    fake = FakeCudart()
    runtime = CudaRuntime(fake)
    with pytest.raises(DeviceCopyFailed, match=r"\(invalid pitch argument, CUDA error 12\)"):
        runtime.copy_rows(1, 4, 1, 4, width=8, rows=1)
    fake.failing = 999
    with pytest.raises(DeviceCopyFailed, match=r"\(no description, CUDA error 999\); the engine must be started again"):
        runtime.synchronise()


def test_a_cache_that_no_machine_holds_is_refused_with_what_to_lower() -> None:
    with pytest.raises(ConfigError, match=r"takes [\d.]+ GB.*lower engine\.slots, .*engine\.kv_cache_bytes"):
        HostPools(Geometry(KvShape(64, 64, 128, "float32"), 1024, 1 << 20, 8))


def test_blocks_that_were_never_written_cost_no_memory() -> None:
    before = resident_bytes()
    pools = HostPools(Geometry(KvShape(8, 8, 64, "float32"), 8, 4096, 1024))
    assert pools.geometry.total_bytes >= 3 << 30
    assert resident_bytes() - before < 64 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_budget_buys_whole_blocks() -> None:
    smollm2 = KvShape(30, 3, 64, "float32")
    block_bytes = 46_080 * 64
    assert blocks_within(smollm2, 1 << 30) == 364
    assert [blocks_within(smollm2, budget) for budget in (0, block_bytes - 1, block_bytes)] == [0, 0, 1]
