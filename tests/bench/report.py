"""What every bench says about itself: figures as rows, and the commit, cores and versions they belong to."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = ROOT / "docs/benchmarks"
THREADS = os.cpu_count() or 1


@dataclass(frozen=True)
class Figure:
    """One measured row of a page."""

    what: str
    median: float
    low: float
    high: float
    unit: str

    def row(self) -> str:
        return f"| {self.what} | {self.median:.1f} | {self.low:.1f} - {self.high:.1f} | {self.unit} |"


def figure(what: str, values: list[float], unit: str) -> Figure:
    """Median and range of repeated measurements; told at once, since the whole takes minutes."""
    measured = Figure(what, statistics.median(values), min(values), max(values), unit)
    print(measured.row(), file=sys.stderr, flush=True)
    return measured


def provenance(*libraries: str) -> str:
    """Commit, machine and versions, one line."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    return f"commit {commit}, {THREADS} cores ({cpu()}), Python {platform.python_version()}, {versions}"


def table(figures: list[Figure]) -> list[str]:
    """Rows under a heading."""
    return ["| | median | range | |", "|---|---|---|---|", *(each.row() for each in figures)]


def publish(page: str, lines: list[str]) -> None:
    """Write docs/benchmarks/<page> and print it."""
    text = "\n".join([*lines, ""])
    PAGES.mkdir(parents=True, exist_ok=True)
    (PAGES / page).write_text(text)
    print(text)


def cpu() -> str:
    """The processor's name, as the kernel gives it."""
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else platform.machine()
