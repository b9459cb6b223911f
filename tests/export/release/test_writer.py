from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from core.manifest import MANIFEST_NAME, Chunk
from export.errors import TargetError
from export.release import writer
from export.release.writer import (
    CHUNK_BYTES,
    PAGE_BYTES,
    DataFile,
    Staging,
    check_apart,
    check_room,
    check_target,
    clear_leftover,
    count_intact,
    matches,
    staged,
    write_file,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def manifest(release: str, *files: str) -> str:
    return json.dumps({"format": 1, "release": release, "files": [{"path": path} for path in files]})


def release(folder: Path, name: str, *files: str) -> None:
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_text(manifest(name, *files))
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("listed")


def write_manifest(staging: Staging, text: str) -> None:
    write_file(staging.release, MANIFEST_NAME, text.encode())


def chunks_of(data: bytes, *ends: int) -> list[Chunk]:
    pieces = [data[start:end] for start, end in zip((0, *ends), (*ends, len(data)), strict=True)]
    return [Chunk(len(piece), hashlib.sha256(piece).hexdigest()) for piece in pieces]


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Within the block, writing beyond fails in the same calls as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_initialisers_start_at_pages_and_begin_a_chunk(tmp_path: Path) -> None:
    first, second = np.arange(5, dtype=np.float32), np.arange(6, dtype=np.uint8).reshape(2, 3)
    with DataFile(tmp_path / "data") as file:
        file.append(first)
        file.end_initialiser()
        assert file.size_bytes == PAGE_BYTES
        file.append(second.T)
        file.append(b"tail")
        file.end_initialiser()
    data = (tmp_path / "data").read_bytes()
    assert data == (first.tobytes().ljust(PAGE_BYTES, b"\0") + (second.T.tobytes() + b"tail").ljust(PAGE_BYTES, b"\0"))
    described = file.describe()
    assert (described.path, described.size_bytes) == ("data", len(data))
    assert described.chunks == chunks_of(data, PAGE_BYTES)
    assert matches(tmp_path, described)


def test_a_long_initialiser_has_a_chunk_every_8_mib(tmp_path: Path) -> None:
    data = np.arange(2 * CHUNK_BYTES + 12, dtype=np.uint8)
    with DataFile(tmp_path / "data") as file:
        for piece in np.array_split(data, 7):
            file.append(piece)
        file.end_initialiser()
    written = (tmp_path / "data").read_bytes()
    assert file.describe().chunks == chunks_of(written, CHUNK_BYTES, 2 * CHUNK_BYTES)


def test_bytes_of_every_element_type_are_written_as_they_are(tmp_path: Path) -> None:
    arrays = [np.ones((2, 3), dtype) for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu)]
    with DataFile(tmp_path / "data") as file:
        for array in arrays:
            file.append(array)
    assert (tmp_path / "data").read_bytes() == b"".join(array.tobytes() for array in arrays)


def test_a_file_is_continued_after_the_chunks_that_are_kept(tmp_path: Path) -> None:
    with DataFile(tmp_path / "data") as file:
        for letter in (b"a", b"b"):
            file.append(letter)
            file.end_initialiser()
    whole = file.describe()
    with (tmp_path / "data").open("ab") as torn:
        torn.write(b"what a killed export had not finished")
    with DataFile(tmp_path / "data", whole.chunks[:1]) as file:
        assert file.size_bytes == PAGE_BYTES
        file.append(b"b")
        file.end_initialiser()
    assert file.describe() == whole
    assert matches(tmp_path, whole)


def test_whoever_waits_for_a_weight_hears_of_it_once_with_its_chunks(tmp_path: Path) -> None:
    heard: list[list[Chunk]] = []
    with DataFile(tmp_path / "data") as file:
        for letter in (b"a", b"b"):
            file.append(letter)
            file.end_initialiser()
            file.when_written(heard.append)
    assert heard == [[chunk] for chunk in file.describe().chunks]


def test_a_disk_that_fills_up_while_the_helper_writes_is_said_to_be_full(tmp_path: Path) -> None:
    out = tmp_path / "release"
    release(out, "old")
    with (
        file_size_limit(1 << 16),
        pytest.raises(TargetError, match="No room for the release"),
        staged(out) as staging,
        DataFile(staging.release / "data") as file,
    ):
        file.append(bytes(1 << 17))
    assert (out / MANIFEST_NAME).read_text() == manifest("old")
    assert names(tmp_path) == ["release"]


def test_a_disk_without_room_is_refused_with_both_figures(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    out = tmp_path / "release"
    check_room(out, free // 2)
    needed = free * 3 + 10_000_000
    with pytest.raises(TargetError) as refusal:
        check_room(out, needed)
    assert f"more on the disk of {out}, which" in refusal.value.message
    figures = [float(number) for number in re.findall(r"([\d.]+) GB", refusal.value.message)]
    assert figures == pytest.approx([needed / 1e9, free / 1e9], rel=0.05)


def test_a_small_disk_is_told_in_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(TargetError, match=r"needs 32\.5 MB more on .*, which has 5\.0 MB free"):
        check_room(tmp_path / "release", 32_500_000)


def test_a_file_that_changed_no_longer_matches(tmp_path: Path) -> None:
    described = write_file(tmp_path, "a", b"one")
    assert matches(tmp_path, described)
    (tmp_path / "a").write_bytes(b"two")
    assert not matches(tmp_path, described)
    (tmp_path / "a").write_bytes(b"longer")
    assert not matches(tmp_path, described)
    (tmp_path / "a").unlink()
    assert not matches(tmp_path, described)


def test_the_chunks_before_a_damage_are_counted(tmp_path: Path) -> None:
    data = bytes(range(200))
    (tmp_path / "data").write_bytes(data)
    chunks = chunks_of(data, 50, 120)
    assert count_intact(tmp_path / "data", chunks) == 3
    (tmp_path / "data").write_bytes(data[:60] + b"\xff" + data[61:])
    assert count_intact(tmp_path / "data", chunks) == 1
    (tmp_path / "data").write_bytes(data[:130])
    assert count_intact(tmp_path / "data", chunks) == 2


def test_a_release_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "release"
    with staged(out) as staging:
        write_manifest(staging, "new")
        staging.journal.write_text("all of it")
        assert not out.exists()
    assert (names(out), names(out.parent)) == ([MANIFEST_NAME], ["release"])


@pytest.mark.parametrize("can_swap", [True, False])
def test_an_old_release_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_swap: bool) -> None:
    if not can_swap:  # a file system that lacks RENAME_EXCHANGE
        monkeypatch.setattr(writer, "_RENAME_EXCHANGE", 1 << 30)
    out = tmp_path / "release"
    release(out, "old")
    with staged(out) as staging:
        write_manifest(staging, "new")
    assert (out / MANIFEST_NAME).read_text() == "new"
    assert names(tmp_path) == ["release"]


@pytest.mark.parametrize("keep", [True, False])
def test_an_error_leaves_the_old_release_and_nothing_else(tmp_path: Path, keep: bool) -> None:
    out = tmp_path / "release"
    release(out, "old")
    with pytest.raises(ZeroDivisionError), staged(out, keep) as staging:
        write_manifest(staging, "half")
        raise ZeroDivisionError
    assert (out / MANIFEST_NAME).read_text() == manifest("old")
    assert names(tmp_path) == ["release"]


def test_an_interrupt_leaves_the_old_release_and_what_was_written(tmp_path: Path) -> None:
    out = tmp_path / "release"
    release(out, "old")
    with pytest.raises(KeyboardInterrupt), staged(out) as staging:
        write_file(staging.release, "data", b"half")
        raise KeyboardInterrupt
    assert (out / MANIFEST_NAME).read_text() == manifest("old")
    with staged(out, keep=True) as staging:
        assert (staging.release / "data").read_bytes() == b"half"
        write_manifest(staging, "new")
    assert names(out) == ["data", MANIFEST_NAME]
    assert names(tmp_path) == ["release"]


def test_what_a_killed_export_left_is_cleared(tmp_path: Path) -> None:
    release(tmp_path / ".release.partial" / "release", "half")
    (tmp_path / ".release.partial" / "journal").write_text("a line")
    out = tmp_path / "release"
    with staged(out) as staging:
        assert names(staging.release) == []
        assert not staging.journal.exists()
        write_manifest(staging, "new")
    assert names(tmp_path) == ["release"]


def test_a_leftover_can_be_cleared_without_an_export_but_not_under_one(tmp_path: Path) -> None:
    out = tmp_path / "release"
    clear_leftover(out)
    assert names(tmp_path) == []
    release(tmp_path / ".release.partial" / "release", "half")
    clear_leftover(out)
    assert names(tmp_path) == []
    with staged(out) as staging:
        with pytest.raises(TargetError, match="Another export is writing"):
            clear_leftover(out)
        write_manifest(staging, "new")
    assert (out / MANIFEST_NAME).read_text() == "new"


def test_a_release_that_stepped_aside_for_a_killed_export_comes_back(tmp_path: Path) -> None:
    release(tmp_path / ".release.partial" / "old", "old")
    out = tmp_path / "release"
    with pytest.raises(ZeroDivisionError), staged(out):
        raise ZeroDivisionError
    assert (out / MANIFEST_NAME).read_text() == manifest("old")


def test_a_second_export_to_the_same_place_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    out = tmp_path / "release"
    with staged(out) as staging:
        write_manifest(staging, "first")
        with pytest.raises(TargetError, match="Another export is writing"), staged(out):
            pytest.fail("two exports at once")
    assert (out / MANIFEST_NAME).read_text() == "first"


def test_the_lock_falls_with_the_process_that_held_it(tmp_path: Path) -> None:
    partial = tmp_path / ".release.partial"
    partial.mkdir()
    held = os.open(partial, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    os.close(held)  # what the system does when a process dies
    with staged(tmp_path / "release") as staging:
        write_manifest(staging, "new")
    assert names(tmp_path) == ["release"]


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(TargetError, match="is not a release"), staged(tmp_path / "photos"):
        pytest.fail("a folder of photos was taken for a release")
    assert names(tmp_path) == ["photos"]


@pytest.mark.parametrize(
    "foreign", ["notes.md", ".hidden", "weights/notes.md", "notes/cat.jpg", "model.onnx.data/cat.jpg"]
)
def test_a_release_that_holds_anything_else_is_never_touched(tmp_path: Path, foreign: str) -> None:
    out = tmp_path / "release"
    release(out, "old", "model.onnx", "model.onnx.data", "weights/data")
    (out / "model.onnx.data").unlink()  # a listed file may be missing; a folder of its name is not that file
    check_target(out)
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("mine")
    first = foreign if foreign.startswith("weights") else foreign.split("/")[0]
    with pytest.raises(TargetError, match=f"holds '{first}', which is not part of a release"), staged(out):
        pytest.fail("a file of somebody's would have been wiped")
    assert (out / foreign).read_text() == "mine"
    assert names(tmp_path) == ["release"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"name": "a web app", "icons": []}',
        '{"format": 2, "release": "a@1"}',
        '{"format": 2, "release": "a@1", "files": ["manifest.json"]}',
        '{"format": 2, "release": "a@1", "files": [{"name": "a"}]}',
    ],
)
def test_a_manifest_of_something_else_makes_no_release(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(TargetError, match=r"is not a release, it holds 'manifest\.json'"):
        check_target(tmp_path)


def test_a_file_that_came_to_the_release_during_an_export_is_not_wiped(tmp_path: Path) -> None:
    out = tmp_path / "release"
    release(out, "old")
    with pytest.raises(TargetError, match=r"holds 'notes\.md'"), staged(out) as staging:
        write_manifest(staging, "new")
        (out / "notes.md").write_text("mine")
    assert names(out) == [MANIFEST_NAME, "notes.md"]


def test_a_checkpoint_in_the_place_of_the_release_is_never_touched(tmp_path: Path) -> None:
    out = tmp_path / "release"
    release(out, "old", "tiny.gguf")
    (tmp_path / "alias").symlink_to(out)
    (tmp_path / "linked.gguf").symlink_to(out / "tiny.gguf")
    for source in (out, out / "tiny.gguf", tmp_path / "alias" / "tiny.gguf", tmp_path / "linked.gguf"):
        with pytest.raises(TargetError, match="would clear away the checkpoint's"):
            check_apart(out, [source])
    check_apart(out / "deeper", [out])
    check_apart(out, [tmp_path, out / ".."])


def test_a_file_or_link_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(TargetError, match="is not a folder"), staged(tmp_path / name):
            pytest.fail("something else was taken for a release")


def test_an_empty_folder_may_become_a_release(tmp_path: Path) -> None:
    out = tmp_path / "release"
    out.mkdir()
    with staged(out) as staging:
        write_manifest(staging, "new")
    assert names(out) == [MANIFEST_NAME]


def test_a_file_on_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TargetError, match=r"/file exists and is not a folder"):
        check_target(tmp_path / "file" / "deep" / "release")


@pytest.mark.parametrize(
    ("length", "words"),
    [(250, r"cannot be written to .*x \(File name too long"), (300, r"x cannot be read \(File name")],
)
def test_a_name_too_long_is_refused_in_a_sentence(tmp_path: Path, length: int, words: str) -> None:
    out = tmp_path / ("x" * length)
    with pytest.raises(TargetError, match=words), staged(out):
        pytest.fail("no folder can be called so")


def test_a_locked_folder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nothing is locked for root
    try:
        with pytest.raises(TargetError, match=r"locked/release cannot be read \(Permission denied\)"):
            check_target(tmp_path / "locked" / "release")
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("out", ["", ".", "..", "releases/..", "/"])
def test_a_place_without_a_name_is_refused(out: str) -> None:
    with pytest.raises(TargetError, match="name a folder"):
        check_target(Path(out))


def test_a_link_in_place_of_the_staging_folder_is_not_followed(tmp_path: Path) -> None:
    release(tmp_path / "mine", "precious")
    (tmp_path / ".release.partial").symlink_to("mine")
    clear_leftover(tmp_path / "release")
    with pytest.raises(TargetError, match=r"\.release\.partial is a link"), staged(tmp_path / "release"):
        pytest.fail("it would have worked in somebody's folder")
    assert names(tmp_path / "mine") == [MANIFEST_NAME]


@pytest.mark.parametrize("link", ["release", "old", "scratch", "journal.new", "release/data", "release/deep"])
def test_links_in_the_staging_folder_are_removed_themselves(tmp_path: Path, link: str) -> None:
    release(tmp_path / "mine", "precious")
    left = tmp_path / ".release.partial" / link
    left.parent.mkdir(parents=True)
    left.symlink_to(tmp_path / "mine" / (MANIFEST_NAME if "data" in link or "journal" in link else ""))
    with staged(tmp_path / "release", keep=True) as staging:
        assert not left.is_symlink()
        with DataFile(staging.release / "data") as file:
            file.append(b"new")
        write_manifest(staging, "new")
    assert (tmp_path / "mine" / MANIFEST_NAME).read_text() == manifest("precious")
    assert names(tmp_path) == ["mine", "release"]


def test_a_data_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"precious")
    (tmp_path / "data").symlink_to("mine")
    with pytest.raises(OSError, match="symbolic links"):
        DataFile(tmp_path / "data")
    assert (tmp_path / "mine").read_bytes() == b"precious"
