"""What a theme of the bench has found: rows with targets, kept on disk so that themes can be run one by one."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from tests.bench.report import ROOT

KEPT = ROOT / ".cache/bench-engine"
"""Where findings wait for the page."""


class Target(msgspec.Struct, frozen=True):
    """A bound on the median: at least or at most so much, in the row's unit."""

    bound: float
    at_least: bool

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def text(self, digits: int) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:.{digits}f}"


def at_least(bound: float) -> Target:
    return Target(bound, True)


def at_most(bound: float) -> Target:
    return Target(bound, False)


class Row(msgspec.Struct, frozen=True):
    """One figure: median and range of repeated measurements."""

    what: str
    median: float
    low: float
    high: float
    unit: str
    target: Target | None = None
    digits: int = 1

    def text(self) -> str:
        n = self.digits
        aim = self.target.text(n) if self.target else ""
        verdict = "" if self.target is None else ("yes" if self.target.met(self.median) else "**no**")
        spread = f"{self.low:.{n}f} - {self.high:.{n}f}"
        return f"| {self.what} | {aim} | {self.median:.{n}f} | {spread} | {self.unit} | {verdict} |"


class Found(msgspec.Struct, frozen=True):
    """A theme's rows and what has to be known to read them."""

    theme: str
    title: str
    rows: list[Row]
    notes: list[str]
    provenance: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Scale:
    """How much to measure: `quick` is for trying the bench, its figures mean nothing."""

    quick: bool = False

    def __call__(self, full: int, quick: int) -> int:
        return quick if self.quick else full


def row(what: str, values: Sequence[float], unit: str, target: Target | None = None, digits: int = 1) -> Row:
    """Median and range; told at once, since the whole takes minutes."""
    made = Row(what, statistics.median(values), min(values), max(values), unit, target, digits)
    tell(made.text())
    return made


def ratios(ours: Sequence[float], theirs: Sequence[float], factor: float = 1.0) -> list[float]:
    """Pair by pair, as they were measured in turn."""
    return [factor * mine / other for mine, other in zip(ours, theirs, strict=True)]


def tell(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def keep(found: Found) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{found.theme}.json").write_bytes(msgspec.json.format(msgspec.json.encode(found)))


def kept(theme: str) -> Found | None:
    path = KEPT / f"{theme}.json"
    return msgspec.json.decode(path.read_bytes(), type=Found) if path.is_file() else None
