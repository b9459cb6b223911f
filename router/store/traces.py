"""Rows that SQLite has moved leave copies of themselves; these are found and overwritten here.

`secure_delete` overwrites rows and pages that are freed. But when a page is full or nearly empty SQLite spreads its
rows over the neighbours and leaves the places they came from as they were: in the room between a page's list of rows
and the first of them, until something else lies there. A later DELETE reaches the row and not the copy. Every page
that was written is in the write-ahead log: these are looked at. Does not know tables, nor when it is safe to write.
https://sqlite.org/fileformat2.html: 1.6 is a page, 4.1 the log.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

MOST_PAGES = 2**25 - 1
"""Of a file: below that the first byte of a page which holds no rows is 0 or 1, and never one of these."""
_INNER = frozenset({2, 5})
_LEAVES = frozenset({10, 13})

_LOG_HEADER = 32
_FRAME_HEADER = 24
_READ_AT_ONCE = 256
"""Pages."""


class Traces:
    """The pages of a file that may hold copies. file: an open descriptor. log: the write-ahead log beside it.

    The file must have no `auto_vacuum` and at most MOST_PAGES.
    """

    def __init__(self, file: int, log: Path) -> None:
        self._file = file
        self._log = log
        self._salt = b""
        self._read_to = 0
        self._pages: set[int] = set()

    def note(self) -> bool:
        """Remember the pages that were written to the log since the last time; False if there were none.

        To be called before SQLite may begin the log anew: before each checkpoint.
        """
        try:
            descriptor = os.open(self._log, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return self._note(descriptor)
        finally:
            os.close(descriptor)

    def _note(self, log: int) -> bool:
        header = os.pread(log, _LOG_HEADER, 0)
        if len(header) < _LOG_HEADER:
            return False
        salt = header[16:24]
        if salt != self._salt:
            self._salt, self._read_to = salt, _LOG_HEADER
        frame = _FRAME_HEADER + int.from_bytes(header[8:12])
        before, size = self._read_to, os.fstat(log).st_size
        while frames := min(_READ_AT_ONCE, (size - self._read_to) // frame):
            data = os.pread(log, frames * frame, self._read_to)
            self._pages.update(int.from_bytes(data[at : at + 4]) for at in range(0, len(data), frame))
            self._read_to += len(data)
        return self._read_to > before

    def note_all(self) -> None:
        """Every page is to be looked at: nobody knows what was done to the file before."""
        self._pages.update(range(1, os.fstat(self._file).st_size // self._page_size() + 1))

    def wipe(self) -> None:
        """Overwrite what lies in the noted pages and in none of their rows. Nobody may write to the file meanwhile.

        What is overwritten is read by nobody; whoever has such a page in memory must forget it before writing it.
        """
        if not self._pages:
            return
        size = self._page_size()
        for first, data in self._read(size):
            for at in range(0, len(data), size):
                page = data[at : at + size]
                start, end = _room(page, 100 if first == 1 and at == 0 else 0)
                if page[start:end] != bytes(end - start):
                    os.pwrite(self._file, bytes(end - start), (first - 1) * size + at + start)
        self._pages.clear()

    def _read(self, size: int) -> Iterator[tuple[int, bytes]]:
        """Runs of noted pages: the number of the first, and what is in them; without those beyond the file's end."""
        pages = sorted(self._pages)
        begin = 0
        while begin < len(pages):
            end = begin + 1
            while end < len(pages) and end - begin < _READ_AT_ONCE and pages[end] == pages[end - 1] + 1:
                end += 1
            data = os.pread(self._file, (end - begin) * size, (pages[begin] - 1) * size)
            yield pages[begin], data[: len(data) // size * size]
            begin = end

    def _page_size(self) -> int:
        (size,) = struct.unpack(">H", os.pread(self._file, 2, 16) or b"\x10\x00")
        return 65536 if size == 1 else int(size)


def _room(page: bytes, header: int) -> tuple[int, int]:
    """Where the list of rows ends and the first row begins; (0, 0) for a page without rows."""
    kind = page[header]
    if kind not in _INNER and kind not in _LEAVES:
        return 0, 0
    count, first = struct.unpack_from(">HH", page, header + 3)
    start = header + (12 if kind in _INNER else 8) + 2 * count
    end = first or 65536
    # Anything else is a damaged page, which is SQLite's to find.
    return (start, end) if start <= end <= len(page) else (0, 0)
