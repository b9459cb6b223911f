"""What of an unfinished release is complete: so that an export that was killed can be continued.

A file of JSON lines, appended to as weights are written. The first line holds the key: whatever must be equal for the
bytes to be equal. Every other line is one weight, in the order in which they lie in the data file. A kill may tear the
last line; a power cut may lose the last seconds of both files. Neither does harm: a torn line is not read, and whoever
continues hashes what he keeps. Does not know what the weights are or how they are written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import msgspec

from core.manifest import Chunk
from export.forms.fidelity import Fidelity

SYNC_EVERY_S = 5.0


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One weight that is complete.

    places: its initialisers' (offset, bytes) by name. chunks: of the data file, up to the end of this weight.
    sources: digests of the source tensors that it was made of; fidelity: how near to them it came. Both by name.
    """

    weight: str
    places: dict[str, tuple[int, int]]
    chunks: list[Chunk]
    sources: dict[str, str]
    fidelity: dict[str, Fidelity]


class _Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str


def read_journal(path: Path, key: str) -> list[Entry] | None:
    """The complete weights; None: there is no journal, or it was written under another key."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was torn
    except FileNotFoundError:
        return None
    try:
        if not lines or msgspec.json.decode(lines[0], type=_Key).key != key:
            return None
    except msgspec.MsgspecError:
        return None
    entries = []
    for line in lines[1:]:
        try:
            entries.append(msgspec.json.decode(line, type=Entry))
        except msgspec.MsgspecError:
            break
    return entries


@dataclass
class Journal:
    """An open journal; `with` it. It is synced to the disk every few seconds of `clock`, if it grew."""

    path: Path
    key: str
    kept: Sequence[Entry]
    clock: Callable[[], float]
    _synced_s: float = field(init=False)

    def __post_init__(self) -> None:
        """Put a journal of the kept entries in place of whatever was there, in one step."""
        fresh = self.path.with_name(self.path.name + ".new")
        self._file = fresh.open("wb", buffering=0)
        for line in (_Key(self.key), *self.kept):
            self._file.write(msgspec.json.encode(line) + b"\n")
        os.fsync(self._file.fileno())
        fresh.replace(self.path)
        self._synced_s = self.clock()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, entry: Entry) -> None:
        """Note that a weight is complete."""
        self._file.write(msgspec.json.encode(entry) + b"\n")
        if self.clock() - self._synced_s >= SYNC_EVERY_S:
            os.fsync(self._file.fileno())
            self._synced_s = self.clock()
