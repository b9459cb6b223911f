from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from core.manifest import MANIFEST_NAME
from export import writer
from export.errors import TargetError
from export.writer import PAGE_BYTES, HashingFile, matches, staged, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def release(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_text(text)


def test_arrays_start_at_pages_and_the_digest_is_of_all_bytes(tmp_path: Path) -> None:
    first, second = np.arange(5, dtype=np.float32), np.arange(6, dtype=np.uint8).reshape(2, 3)
    with HashingFile(tmp_path / "data") as file:
        assert file.append_array(first) == (0, 20)
        assert file.append_array(second.T) == (PAGE_BYTES, 6)
    written = (tmp_path / "data").read_bytes()
    assert written[PAGE_BYTES:] == second.T.tobytes()
    described = file.describe()
    assert (described.path, described.size_bytes) == ("data", len(written))
    assert described.sha256 == hashlib.sha256(written).hexdigest()
    assert matches(tmp_path, described)


def test_a_file_that_changed_no_longer_matches(tmp_path: Path) -> None:
    described = write_file(tmp_path, "a", b"one")
    (tmp_path / "a").write_bytes(b"two")
    assert not matches(tmp_path, described)
    (tmp_path / "a").write_bytes(b"longer")
    assert not matches(tmp_path, described)
    (tmp_path / "a").unlink()
    assert not matches(tmp_path, described)


def test_a_release_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "release"
    with staged(out) as folder:
        write_file(folder, MANIFEST_NAME, b"new")
        assert not out.exists()
    assert (names(out), names(out.parent)) == ([MANIFEST_NAME], ["release"])


@pytest.mark.parametrize("can_swap", [True, False])
def test_an_old_release_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_swap: bool) -> None:
    if not can_swap:  # a file system that lacks RENAME_EXCHANGE
        monkeypatch.setattr(writer, "_RENAME_EXCHANGE", 1 << 30)
    out = tmp_path / "release"
    release(out, "old")
    with staged(out) as folder:
        write_file(folder, MANIFEST_NAME, b"new")
    assert (out / MANIFEST_NAME).read_text() == "new"
    assert names(tmp_path) == ["release"]


def test_an_error_leaves_the_old_release_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "release"
    release(out, "old")
    with pytest.raises(ZeroDivisionError), staged(out) as folder:
        write_file(folder, MANIFEST_NAME, b"half")
        raise ZeroDivisionError
    assert (out / MANIFEST_NAME).read_text() == "old"
    assert names(tmp_path) == ["release"]


def test_what_a_killed_export_left_is_cleared(tmp_path: Path) -> None:
    release(tmp_path / ".release.partial" / "release", "half")
    out = tmp_path / "release"
    with staged(out) as folder:
        assert names(folder) == []
        write_file(folder, MANIFEST_NAME, b"new")
    assert names(tmp_path) == ["release"]


def test_a_release_that_stepped_aside_for_a_killed_export_comes_back(tmp_path: Path) -> None:
    release(tmp_path / ".release.partial" / "old", "old")
    out = tmp_path / "release"
    with pytest.raises(ZeroDivisionError), staged(out):
        raise ZeroDivisionError
    assert (out / MANIFEST_NAME).read_text() == "old"


def test_a_second_export_to_the_same_place_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    out = tmp_path / "release"
    with staged(out) as folder:
        write_file(folder, MANIFEST_NAME, b"first")
        with pytest.raises(TargetError, match="Another export is writing"), staged(out):
            pytest.fail("two exports at once")
    assert (out / MANIFEST_NAME).read_text() == "first"


def test_the_lock_falls_with_the_process_that_held_it(tmp_path: Path) -> None:
    staging = tmp_path / ".release.partial"
    staging.mkdir()
    held = os.open(staging, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    os.close(held)  # what the system does when a process dies
    with staged(tmp_path / "release") as folder:
        write_file(folder, MANIFEST_NAME, b"new")
    assert names(tmp_path) == ["release"]


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(TargetError, match="is not a release"), staged(tmp_path / "photos"):
        pytest.fail("a folder of photos was taken for a release")
    assert names(tmp_path) == ["photos"]


def test_a_file_or_link_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(TargetError, match="is not a folder"), staged(tmp_path / name):
            pytest.fail("something else was taken for a release")


def test_an_empty_folder_may_become_a_release(tmp_path: Path) -> None:
    out = tmp_path / "release"
    out.mkdir()
    with staged(out) as folder:
        write_file(folder, MANIFEST_NAME, b"new")
    assert names(out) == [MANIFEST_NAME]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(TargetError, match=r"cannot be written to .*file/release"),
        staged(tmp_path / "file" / "release"),
    ):
        pytest.fail("a folder was made below a file")
