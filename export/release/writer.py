"""Files of a release: hashed while they are written, and published whole or not at all.

    releases/.name.partial/release/     written here, under a lock, manifest last, everything fsynced
    releases/.name.partial/journal      what of it is complete (export/release/journal.py)
    releases/name                       swapped in by one rename

A file is described by the sha256 of its chunks, at most 8 MiB each. In the data file every initialiser starts at a
page and begins a chunk; the padding behind it belongs to its last chunk.

An export that is killed or interrupted leaves at most the `.partial` folder, which no node looks at; the next export
clears it, or continues in it. An export that fails clears it itself. Does not know what the files mean.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from core.manifest import MANIFEST_NAME, Chunk, ReleaseFile
from export.errors import TargetError

PAGE_BYTES = 4096
CHUNK_BYTES = 8 << 20
_PIECES_AHEAD = 4
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class ChunkHasher:
    """Digests of a stream of bytes, one every CHUNK_BYTES and wherever it is cut."""

    def __init__(self, kept: Sequence[Chunk] = ()) -> None:
        self.chunks = list(kept)
        self._digest = hashlib.sha256()
        self._filled = 0

    def update(self, data: memoryview) -> None:
        """Take more bytes."""
        while data:
            piece = data[: CHUNK_BYTES - self._filled]
            self._digest.update(piece)
            self._filled += len(piece)
            data = data[len(piece) :]
            if self._filled == CHUNK_BYTES:
                self.cut()

    def cut(self) -> None:
        """End the running chunk here, if it holds anything."""
        if self._filled:
            self.chunks.append(Chunk(self._filled, self._digest.hexdigest()))
            self._digest, self._filled = hashlib.sha256(), 0


class DataFile:
    """A file that grows from front to back; one helper thread hashes and writes while the caller makes the next bytes.

    `with` it, then ask `describe()`. On leaving the block without an error it is on the disk, fsynced. `kept` chunks
    are taken to be in the file already; whatever follows them is cut off. What is appended must not change afterwards.
    """

    def __init__(self, path: Path, kept: Sequence[Chunk] = ()) -> None:
        self._path = path
        self.size_bytes = sum(chunk.size_bytes for chunk in kept)
        self._hasher = ChunkHasher(kept)
        self._noted = len(kept)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(path, flags, 0o644), "r+b", buffering=0)
        self._file.truncate(self.size_bytes)
        self._file.seek(self.size_bytes)
        self._helper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data-file")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            try:
                if error is None:
                    self._wait(at_most=0)
                    self.sync()
            finally:
                self._helper.shutdown(cancel_futures=True)

    def append(self, data: bytes | NDArray[Any]) -> None:
        """Add bytes, an array's in C order; waits while several pieces are ahead. Raises OSError of earlier pieces."""
        # A flat view of bytes: no copy is made of an array that is contiguous already.
        flat = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else _bytes_of(data)
        self.size_bytes += len(flat)
        self._submit(lambda: self._write(flat.data))

    def end_initialiser(self) -> None:
        """Fill up the page and end the chunk: the next bytes are another initialiser's."""
        self.append(bytes(-self.size_bytes % PAGE_BYTES))
        self._submit(self._hasher.cut)

    def when_written(self, note: Callable[[list[Chunk]], None]) -> None:
        """Call `note`, in the helper thread, when all that was appended is written, with the chunks since last time."""

        def call() -> None:
            fresh = self._hasher.chunks[self._noted :]
            self._noted += len(fresh)
            note(fresh)

        self._submit(call)

    def sync(self) -> None:
        """Wait until the disk has what was written so far."""
        os.fsync(self._file.fileno())

    def describe(self) -> ReleaseFile:
        """The file as the manifest lists it; after the block."""
        self._hasher.cut()
        return ReleaseFile(self._path.name, self.size_bytes, self._hasher.chunks)

    def _write(self, data: memoryview) -> None:
        self._hasher.update(data)
        while data:
            data = data[self._file.write(data) :]

    def _submit(self, job: Callable[[], None]) -> None:
        self._wait(at_most=_PIECES_AHEAD)
        self._waiting.append(self._helper.submit(job))

    def _wait(self, at_most: int) -> None:
        while len(self._waiting) > at_most:
            self._waiting.popleft().result()


def write_file(folder: Path, name: str, data: bytes) -> ReleaseFile:
    """Write one small file."""
    hasher = ChunkHasher()
    hasher.update(memoryview(data))
    hasher.cut()
    with (folder / name).open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return ReleaseFile(name, len(data), hasher.chunks)


def matches(folder: Path, listed: ReleaseFile) -> bool:
    """Whether a file of a release is there and has the listed bytes."""
    path = folder / listed.path
    if not path.is_file() or path.stat().st_size != listed.size_bytes:
        return False
    return count_intact(path, listed.chunks) == len(listed.chunks)


def count_intact(path: Path, chunks: Sequence[Chunk]) -> int:
    """How many chunks, from the first on, a file holds as listed."""
    with path.open("rb", buffering=0) as file:
        for count, chunk in enumerate(chunks):
            digest, left = hashlib.sha256(), chunk.size_bytes
            while left and (piece := file.read(min(left, CHUNK_BYTES))):
                digest.update(piece)
                left -= len(piece)
            if left or digest.hexdigest() != chunk.sha256:
                return count
    return len(chunks)


class _Listed(msgspec.Struct):
    path: str


class _Listing(msgspec.Struct):
    """What the manifests of all formats have in common."""

    format: int
    release: str
    files: list[_Listed]


def check_target(out: Path) -> None:
    """Raise TargetError if `out` is something that an export must not replace: all but nothing, an empty folder, and
    a release with nothing beside its own files. Nor must it be where no folder can be."""
    if out.name in ("", ".."):
        raise TargetError(f"--out {str(out)!r} says where, but not what the release's folder is called; name a folder.")
    # What exists of the path, the longest: the rest will be made.
    nearest = next((place for place in (out, *out.parents) if os.path.lexists(place)), Path())
    try:
        if not nearest.is_dir() or out.is_symlink():
            raise TargetError(f"{nearest} exists and is not a folder; choose another --out.")
        if out.is_dir():
            _check_content(out)
    except OSError as error:
        raise TargetError(f"{out} cannot be read ({error.strerror or error}); choose another --out.") from error


def _check_content(out: Path) -> None:
    listed = _listed_in(out)
    foreign = _first_foreign(out, listed or frozenset())
    if foreign is not None:
        fault = "is not a release, it" if listed is None else "holds more than a release, it"
        raise TargetError(
            f"The folder {out} {fault} holds {foreign!r}, which is not part of a release; choose another --out, or "
            "move that away."
        )


def check_apart(out: Path, sources: Iterable[Path]) -> None:
    """Raise TargetError if a file or folder that the release is made from lies where an export clears up."""
    places = [Path(os.path.realpath(place)) for place in (out, staging_of(out).release.parent)]
    for source in sources:
        ends = [Path(os.path.realpath(source))]
        if os.path.islink(source):
            ends.append(Path(os.path.realpath(source.parent), source.name))
        if any(end.is_relative_to(place) for end in ends for place in places):
            raise TargetError(f"An export to {out} would clear away the checkpoint's {source}; choose another --out.")


def _listed_in(folder: Path) -> frozenset[str] | None:
    """The files of the release in a folder, its manifest among them; None: it is no release."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        listing = msgspec.json.decode(path.read_bytes(), type=_Listing)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return frozenset({MANIFEST_NAME, *(file.path for file in listing.files)})


def _first_foreign(folder: Path, listed: frozenset[str], under: str = "") -> str | None:
    """The first file, link or folder that is not listed, by its path in the release; hidden ones are no exception."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = under + entry.name
            if not entry.is_dir(follow_symlinks=False):
                foreign = None if name in listed else name
            elif any(path.startswith(f"{name}/") for path in listed):
                foreign = _first_foreign(folder / entry.name, listed, f"{name}/")
            else:
                foreign = name
            if foreign is not None:
                return foreign
    return None


def check_room(out: Path, needed_bytes: int) -> None:
    """Raise TargetError if the disk on which `out` will be has less room than that; its parent is there."""
    free_bytes = shutil.disk_usage(out.parent).free
    if needed_bytes > free_bytes:
        raise TargetError(
            f"The release needs {_size(needed_bytes)} more on the disk of {out}, which has "
            f"{_size(free_bytes)} free (a release that is replaced stays until the new one is whole); "
            "free some space or choose another --out."
        )


@dataclass(frozen=True)
class Staging:
    """Where a release is written: `release` is the folder that will be published; beside it `journal`, a file, and
    `scratch`, a folder for whoever needs one."""

    release: Path
    journal: Path
    scratch: Path


def staging_of(out: Path) -> Staging:
    """The places for a release that will be `out`."""
    folder = out.parent / f".{out.name}.partial"
    return Staging(folder / "release", folder / "journal", folder / "scratch")


@contextmanager
def staged(out: Path, keep: bool = False) -> Iterator[Staging]:
    """A folder to write the release in; it becomes `out` when the block ends without an error.

    It is empty, or, with `keep`, as a killed or interrupted export left it. An Exception inside removes it, an
    interrupt leaves it; `out` is as it was after either. An interrupt that comes when all is written is not heard any
    more. Links in what was left are removed, never followed.
    Raises TargetError: `out` is something else, another export is at work, the disk is full.
    """
    check_target(out)
    staging = staging_of(out)
    folder = staging.release.parent
    with _explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, out):
            try:
                _drop_links(folder)
                _restore(folder, out)
                if not keep:
                    _clear(folder)
                staging.release.mkdir(exist_ok=True)
                yield staging
                check_target(out)  # hours may have passed since
                with _undisturbed():
                    _publish(staging.release, out)
                    shutil.rmtree(folder, ignore_errors=True)
            except Exception:
                _restore(folder, out)
                shutil.rmtree(folder, ignore_errors=True)
                raise


def clear_leftover(out: Path) -> None:
    """Remove what a killed export to `out` left, unless one is at work there."""
    folder = staging_of(out).release.parent
    with _explained(out):
        if folder.is_dir() and not folder.is_symlink():
            with _locked(folder, out):
                _drop_links(folder)
                _restore(folder, out)
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Within the block no signal of a person ends this process's work: it could not be told how far that had come."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's, which is not here
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drop_links(staging: Path) -> None:
    """Remove links, themselves: an export makes none, and writing or clearing through one would harm what it names."""
    for folder in (staging, staging / "release"):
        for leftover in folder.iterdir() if folder.is_dir() else ():
            if leftover.is_symlink():
                leftover.unlink()


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
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


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
        if staging.is_symlink():
            raise TargetError(f"{staging} is a link, where an export keeps a folder; remove it.")
        staging.mkdir(exist_ok=True)
        try:
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
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


def _bytes_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Say in a sentence what the system refuses within the block."""
    try:
        yield
    except OSError as error:
        raise _explain(error, out) from error


def _explain(error: OSError, out: Path) -> TargetError:
    if error.errno in _FULL:
        return TargetError(f"No room for the release in {out.parent}; free some space or choose another --out.")
    return TargetError(f"The release cannot be written to {out} ({error.strerror or error}); choose another --out.")
