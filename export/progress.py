"""What a person sees while an export writes: on a terminal one live line, elsewhere a plain line now and then.

    layers.3.experts.gate_up: 5.6 of 13.8 GB, 0.52 GB/s, 16 s left, peak RSS 1.1 GB

Bytes are those of the data file. Does not know what writes them.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Never, TextIO

from tqdm import tqdm

LIVE_LINE_EVERY_S = 0.1
PLAIN_LINE_EVERY_S = 10.0


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far.

    Not getrusage's ru_maxrss, which begins with the peak of whoever started this process.
    """
    status = Path("/proc/self/status").read_text()
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kibibytes) * 1024


@dataclass(frozen=True)
class Moment:
    """How far a writer has come: bytes that were there when it began, that are there now, and that will be."""

    kept_bytes: int
    done_bytes: int
    total_bytes: int
    elapsed_s: float

    @property
    def bytes_per_s(self) -> float:
        """Speed since the beginning."""
        return (self.done_bytes - self.kept_bytes) / max(self.elapsed_s, 1e-9)

    def describe(self, peak_bytes: int) -> str:
        """On the way: "5.6 of 13.8 GB, 0.52 GB/s, 16 s left, peak RSS 1.1 GB"."""
        left_bytes = self.total_bytes - self.done_bytes
        left = f"{left_bytes / self.bytes_per_s:.0f} s left" if self.bytes_per_s else "time left unknown"
        unit, unit_bytes = _unit(self.total_bytes)
        amount = f"{self.done_bytes / unit_bytes:.1f} of {self.total_bytes / unit_bytes:.1f} {unit}"
        return f"{amount}, {self._speed()}, {left}, {_peak(peak_bytes)}"

    def summarise(self, peak_bytes: int) -> str:
        """At the end: "13.8 GB in 26.5 s (0.52 GB/s), peak RSS 1.1 GB"."""
        fresh_bytes = self.done_bytes - self.kept_bytes
        kept = f", {_amount(self.kept_bytes)} kept" if self.kept_bytes else ""
        return f"{_amount(fresh_bytes)} in {self.elapsed_s:.1f} s ({self._speed()}){kept}, {_peak(peak_bytes)}"

    def _speed(self) -> str:
        return f"{self.bytes_per_s / 1e9:.2f} GB/s"


def _unit(size_bytes: int) -> tuple[str, float]:
    return ("GB", 1e9) if size_bytes >= 1e9 else ("MB", 1e6)


def _amount(size_bytes: int) -> str:
    unit, unit_bytes = _unit(size_bytes)
    return f"{size_bytes / unit_bytes:.1f} {unit}"


def _peak(size_bytes: int) -> str:
    return f"peak RSS {_amount(size_bytes)}"


@dataclass
class Progress:
    """Counts what is written; `with` it. The summary is printed when the block ends well."""

    total_bytes: int
    kept_bytes: int = 0
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = time.monotonic
    peak: Callable[[], int] = peak_memory_bytes
    name: str = ""

    def __post_init__(self) -> None:
        self.done_bytes = self.kept_bytes
        self._began_s = self._told_s = self.clock()
        self._bar: tqdm[Never] | None = None
        if self.stream.isatty():
            self._bar = tqdm(file=self.stream, bar_format="{desc}", leave=False, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if error is None:
            print(f"export: wrote {self.moment().summarise(self.peak())}", file=self.stream, flush=True)

    def moment(self) -> Moment:
        """How far it has come."""
        return Moment(self.kept_bytes, self.done_bytes, self.total_bytes, self.clock() - self._began_s)

    def show(self, name: str, done_bytes: int) -> None:
        """`name` is being written, and so many bytes are there now, kept ones included."""
        self.name, self.done_bytes = name, done_bytes
        now_s = self.clock()
        if now_s - self._told_s < (PLAIN_LINE_EVERY_S if self._bar is None else LIVE_LINE_EVERY_S):
            return
        self._told_s = now_s
        if self._bar is None:
            print(f"export: {self._line()}", file=self.stream, flush=True)
        else:
            self._bar.set_description_str(self._line()[: shutil.get_terminal_size().columns - 1])

    def _line(self) -> str:
        return f"{self.name}: {self.moment().describe(self.peak())}"
