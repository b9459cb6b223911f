"""Files of a release: hashed while they are written, and published whole or not at all.

    releases/.name.partial/release/     written here, under a lock, manifest last, everything fsynced
    releases/name                       swapped in by one rename

A killed export leaves at most the `.partial` folder, which no node looks at and the next export clears.
Does not know what the files mean.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.manifest import MANIFEST_NAME, ReleaseFile
from export.errors import TargetError

PAGE_BYTES = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class HashingFile:
    """A new file of a release; `with` it, then ask `describe()`. On leaving the block it is on the disk, fsynced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        self._digest.update(data)
        self._file.write(data)
        self.size_bytes += len(data)

    def append_array(self, values: NDArray[Any]) -> tuple[int, int]:
        """Append an array's bytes at the next page; returns (offset, length) in bytes."""
        self.write(b"\0" * (-self.size_bytes % PAGE_BYTES))
        offset = self.size_bytes
        # A flat view of bytes: no copy is made of an array that is contiguous already.
        self.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return offset, self.size_bytes - offset

    def describe(self) -> ReleaseFile:
        """The file as the manifest lists it."""
        return ReleaseFile(self._path.name, self.size_bytes, self._digest.hexdigest())


def write_file(folder: Path, name: str, data: bytes) -> ReleaseFile:
    """Write one small file."""
    with HashingFile(folder / name) as file:
        file.write(data)
    return file.describe()


def matches(folder: Path, listed: ReleaseFile) -> bool:
    """Whether a file of a release is there and has the listed bytes."""
    path = folder / listed.path
    if not path.is_file() or path.stat().st_size != listed.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == listed.sha256


def check_target(out: Path) -> None:
    """Raise TargetError if `out` is something that an export must not replace."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise TargetError(f"{out} exists and is not a folder; choose another --out.")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_NAME).is_file():
        raise TargetError(f"The folder {out} holds something that is not a release; empty it or choose another --out.")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """An empty folder to write the release in; it becomes `out` when the block ends without an error.

    Raises TargetError: `out` is something else, another export is at work, the disk is full.
    Whatever is raised inside, the staging folder is removed and `out` is as it was.
    """
    check_target(out)
    staging = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(staging, out):
            try:
                _restore(staging, out)
                _clear(staging)
                folder = staging / "release"
                folder.mkdir()
                yield folder
                _publish(folder, out)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise _explain(error, out) from error


def _publish(folder: Path, out: Path) -> None:
    """Put the whole release in its place in one step."""
    _sync_folder(folder)
    if out.is_dir() and any(out.iterdir()):
        _exchange(folder, out)
    else:
        folder.rename(out)
    _sync_folder(out.parent)


def _exchange(folder: Path, out: Path) -> None:
    """Swap two folders atomically; where the system cannot, the old one steps aside for a moment (see _restore)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    paths = (_AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(out), _RENAME_EXCHANGE)
    if renameat2 is not None and renameat2(*paths) == 0:
        return
    out.rename(folder.parent / "old")
    folder.rename(out)


def _restore(staging: Path, out: Path) -> None:
    """Put back a release that stepped aside for an export which then was killed."""
    old = staging / "old"
    if old.is_dir() and not out.exists():
        old.rename(out)


def _clear(staging: Path) -> None:
    for leftover in staging.iterdir():
        shutil.rmtree(leftover)


@contextmanager
def _locked(staging: Path, out: Path) -> Iterator[None]:
    """Hold the staging folder; the system frees it when this process ends in any way."""
    descriptor = _lock(staging, out)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(staging: Path, out: Path) -> int:
    """Make, open and lock the staging folder; returns its descriptor."""
    while True:
        staging.mkdir(exist_ok=True)
        try:
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # another export ended just now and removed its folder
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if staging.exists() and os.path.samestat(os.fstat(descriptor), staging.stat()):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise TargetError(f"Another export is writing {out}; wait for it to end.") from error
        os.close(descriptor)  # locked, but the folder had been removed before: once more


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, out: Path) -> TargetError:
    if error.errno in _FULL:
        return TargetError(f"No room for the release in {out.parent}; free some space or choose another --out.")
    return TargetError(f"The release cannot be written to {out} ({error.strerror or error}); choose another --out.")
