"""Copies and verified drafts on real graphs: a copied cache is as good as one that was read, bit for bit.

On the small real model and on a tiny gpt-oss, whose layers have windows and sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from core.manifest import MANIFEST_NAME, Manifest, decode_manifest
from edge_node.engine.step import Chunk, Decode, Load, Logits, Move, Save, StepPlan
from edge_node.runtime import runner as runner_module
from edge_node.runtime.runner import MOST_WANTED, Runner
from export.build import Order, export
from export.recipes import Recipe
from tests.tools.gpt_oss_checkpoint import TINY, write_checkpoint

SLOTS = 4
CONTEXT = 256
BLOCKS = 6
PREFIX = 128
"""Two blocks: several windows of the tiny gpt-oss."""

SLOT, OTHER = 0, 2


def manifest_of(folder: Path) -> Manifest:
    return decode_manifest((folder / MANIFEST_NAME).read_bytes(), "the test's release")


def open_runner(folder: Path) -> Runner:
    return Runner.open(folder, manifest_of(folder), "cpu", 1, SLOTS, CONTEXT, prefix_blocks=BLOCKS)


@pytest.fixture(scope="module")
def gpt_oss_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt-oss")
    checkpoint = write_checkpoint(folder / "checkpoint", TINY)
    export(Order(str(checkpoint), folder / "tiny-oss", "tiny-oss", Recipe.CPU_INT8, run=False))
    return folder / "tiny-oss"


@pytest.fixture(scope="module", params=["smollm2", "gpt-oss"])
def release(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue("smollm2_release" if request.param == "smollm2" else "gpt_oss_release")
    return folder


@pytest.fixture(scope="module")
def runner(release: Path) -> Runner:
    """Shared on purpose: its slots and blocks are full of what earlier tests left there."""
    return open_runner(release)


@pytest.fixture(scope="module")
def ids(release: Path) -> list[int]:
    known = manifest_of(release).tokenizer_size
    return [int(token) for token in np.random.default_rng(4).integers(0, known, CONTEXT)]


def chunk(slot: int, start: int, ids: list[int], wanted: Sequence[int] = ()) -> Chunk:
    return Chunk(slot, start, ids, list(wanted))


def plan(chunk: Chunk | None = None, decode: Decode | None = None, **copies: Any) -> StepPlan:
    return StepPlan(0, chunk, decode, 0.0, **copies)


def read(runner: Runner, slot: int, ids: list[int], border: int = 96) -> None:
    """Two chunks, whose border usually is not one of blocks; the experts of gpt-oss feel where it is."""
    runner.run(plan(chunk(slot, 0, ids[:border])))
    runner.run(plan(chunk(slot, border, ids[border:])))


def scribble(runner: Runner, slot: int, ids: list[int]) -> None:
    """Leave in a slot what must not show."""
    read(runner, slot, ids[::-1][:CONTEXT])


def go_on(runner: Runner, slot: int, ids: list[int], **copies: Any) -> list[Logits]:
    """Read eight ids after the prefix, then write three: all logits. The copies come with the first step."""
    first = chunk(slot, PREFIX, ids[PREFIX : PREFIX + 8], [0, 7])
    logits = [bits(runner.run(plan(first, **copies)).chunk_logits)]
    return logits + [write(runner, slot, PREFIX + 8 + at, ids) for at in range(3)]


def write(runner: Runner, slot: int, position: int, ids: list[int], **copies: Any) -> Logits:
    return bits(runner.run(plan(decode=Decode(slot, [ids[position]], [position + 1], [0]), **copies)).decode_logits)


def bits(logits: Logits | None) -> Logits:
    assert logits is not None and np.isfinite(logits).all() and len(np.unique(logits)) > 100
    return logits.copy()


def same(one: Sequence[NDArray[Any]], other: Sequence[NDArray[Any]]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_prefix_that_another_sequence_saved_is_as_good_as_one_that_was_read(runner: Runner, ids: list[int]) -> None:
    scribble(runner, SLOT, ids)
    runner.run(plan(saves=[Save(SLOT, 0, [0, 1, 2, 3])]))  # what lies in the blocks before
    runner.run(plan(chunk(SLOT, 0, ids[:96]), saves=[Save(SLOT, 0, [4])]))
    runner.run(plan(chunk(SLOT, 96, ids[96:PREFIX]), saves=[Save(SLOT, 1, [1])]))
    anew = go_on(runner, SLOT, ids)
    scribble(runner, OTHER, ids)
    assert not same(go_on(runner, OTHER, ids), anew), "the loaded blocks would not show"
    scribble(runner, OTHER, ids)
    assert same(go_on(runner, OTHER, ids, loads=[Load(OTHER, [4, 1])]), anew)


def test_blocks_outlive_the_sequence_that_saved_them(runner: Runner, ids: list[int]) -> None:
    read(runner, SLOT, ids[:PREFIX])
    anew = go_on(runner, SLOT, ids)
    runner.run(plan(saves=[Save(SLOT, 0, [5, 0])]))
    scribble(runner, SLOT, ids)
    assert same(go_on(runner, SLOT, ids, loads=[Load(SLOT, [5, 0])]), anew)


def test_a_part_of_a_saved_prefix_can_be_used_and_the_rest_read(runner: Runner, ids: list[int]) -> None:
    read(runner, SLOT, ids[:PREFIX], border=64)
    anew = go_on(runner, SLOT, ids)
    runner.run(plan(saves=[Save(SLOT, 0, [2, 3])]))
    scribble(runner, OTHER, ids)
    runner.run(plan(chunk(OTHER, 64, ids[64:PREFIX]), loads=[Load(OTHER, [2])]))
    assert same(go_on(runner, OTHER, ids), anew)


def test_a_sequence_that_is_moved_while_it_reads_or_writes_goes_on_unchanged(runner: Runner, ids: list[int]) -> None:
    read(runner, SLOT, ids[:PREFIX])
    stayed = [*go_on(runner, SLOT, ids), write(runner, SLOT, PREFIX + 11, ids)]
    read(runner, SLOT, ids[:PREFIX])
    scribble(runner, OTHER, ids)
    moved = go_on(runner, OTHER, ids, moves=[Move(SLOT, OTHER, PREFIX)])
    back = [Move(OTHER, 3, PREFIX + 11), Move(3, 1, PREFIX + 11)]
    scribble(runner, 1, ids)
    scribble(runner, 3, ids)
    assert same([*moved, write(runner, 1, PREFIX + 11, ids, moves=back)], stayed)


def test_a_chunk_that_wants_all_its_logits_gives_those_that_are_wanted_one_by_one(
    runner: Runner, ids: list[int]
) -> None:
    read(runner, SLOT, ids[:PREFIX])
    for length in (2, 4, 8, MOST_WANTED):
        draft = ids[PREFIX : PREFIX + length]
        alone = [bits(runner.run(plan(chunk(SLOT, PREFIX, draft, [at]))).chunk_logits)[0] for at in range(length)]
        together = runner.run(plan(chunk(SLOT, PREFIX, draft, range(length)))).chunk_logits
        assert same(list(bits(together)), alone)


def test_the_logits_of_the_longest_draft_and_of_a_full_batch_lie_side_by_side(runner: Runner, ids: list[int]) -> None:
    read(runner, 3, ids[:PREFIX])
    draft = chunk(3, PREFIX, ids[PREFIX : PREFIX + MOST_WANTED], range(MOST_WANTED))
    batch = Decode(0, ids[:SLOTS], [1, 1, 1, PREFIX + MOST_WANTED + 1], list(range(SLOTS)))
    alone = runner.run(plan(draft)).chunk_logits, runner.run(plan(decode=batch)).decode_logits
    alone = bits(alone[0]), bits(alone[1])
    both = runner.run(plan(draft, batch))
    assert same([bits(both.chunk_logits), bits(both.decode_logits)], alone)


def test_a_chunk_that_wants_more_logits_than_there_is_room_for_is_refused(runner: Runner, ids: list[int]) -> None:
    too_many = MOST_WANTED + 1
    with pytest.raises(ValueError, match=r"wants the logits of 17 positions, the runner has room for 16"):
        runner.run(plan(chunk(SLOT, 0, ids[:24], range(too_many))))


def test_what_copies_cost_is_told_apart_from_what_is_computed(runner: Runner, ids: list[int]) -> None:
    copied = runner.run(plan(loads=[Load(SLOT, [0, 1])], saves=[Save(SLOT, 0, [2])]))
    assert copied.copy_s > 0 and copied.chunk_logits is copied.decode_logits is None
    assert copied.chunk_s < copied.copy_s and copied.decode_s < copied.copy_s


class TestWarmUp:
    def test_it_measures_reading_writing_verifying_and_each_kind_of_copy(self, release: Path) -> None:
        measured = open_runner(release).warm_up(speculation=True)
        verified = [one for one, _ in measured if one.chunk and one.chunk.wanted]
        assert [len(one.chunk.ids) for one in verified if one.chunk] == [2, 4, 8, 16]
        assert all(one.chunk and len(one.chunk.wanted) == len(one.chunk.ids) for one in verified)
        assert [bool(one.chunk) for one, _ in measured].count(True) == 3 + 4
        assert [len(one.decode.ids) for one, _ in measured if one.decode] == [1, SLOTS]
        copied = [(one, result) for one, result in measured if not (one.chunk or one.decode)]
        assert [(len(one.saves), len(one.loads), len(one.moves)) for one, _ in copied] == [
            (1, 0, 0),
            (0, 1, 0),
            (0, 0, 1),
        ]
        assert all(result.copy_s > 0 for _, result in copied)

    def test_drafts_are_measured_only_where_they_are_tried(self, runner: Runner) -> None:
        assert not [one for one, _ in runner.warm_up() if one.chunk and one.chunk.wanted]

    def test_longer_drafts_are_left_out_once_one_is_slow(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner_module, "_SLOW_S", 0.0)
        verified = [one.chunk for one, _ in runner.warm_up(speculation=True) if one.chunk and one.chunk.wanted]
        assert [len(one.ids) for one in verified] == [2]

    def test_the_smallest_runner_warms_up_without_room_for_any_copy(self, release: Path) -> None:
        small = Runner.open(release, manifest_of(release), "cpu", 1, 1, 16)
        assert all(one.chunk or one.decode for one, _ in small.warm_up(speculation=True))
