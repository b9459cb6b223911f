"""`make bench-failover`: what lost nodes, drains, the journal and slow readers cost: docs/benchmarks/failover.md.

    python -m tests.bench.failover                  every theme, each in a process of its own; about ten minutes
    python -m tests.bench.failover --only journal   these; the page keeps what the others found before
    python -m tests.bench.failover --quick          to see that it runs; figures mean nothing, no page is written

Candidates alternate within one run; the machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from typing import Protocol, cast

import msgspec

from tests.bench.engine.rows import Found, Scale, keep, kept, tell
from tests.bench.report import ROOT, provenance, publish

THEMES = ("kills", "drain", "journal", "stalled")
"""Modules beside this one; each has `measure`."""


class Theme(Protocol):
    """A module of this folder."""

    def measure(self, scale: Scale) -> Found: ...


def main() -> int:
    """Some or all themes; 1 if one of them failed."""
    options = _options()
    chosen = options.only.split(",") if options.only else list(THEMES)
    if unknown := [theme for theme in chosen if theme not in THEMES]:
        raise SystemExit(f"bench: there is no theme {unknown[0]!r}; there are {', '.join(THEMES)}.")
    failed: list[str] = []
    if len(chosen) == 1:
        found = run(chosen[0], Scale(options.quick))
        if not options.quick:
            keep(found)
    else:
        failed = [theme for theme in chosen if not run_apart(theme, options.quick)]
    if not options.quick:
        publish("failover.md", page([each for theme in THEMES if (each := kept(_name(theme)))]))
    if failed:
        tell(f"bench: failed: {', '.join(failed)}; `--only` runs one of them again.")
    return 1 if failed else 0


def run(theme: str, scale: Scale) -> Found:
    """Measure one theme in this process."""
    module = cast(Theme, importlib.import_module(f"tests.bench.failover.{theme}"))
    began = time.monotonic()
    found = module.measure(scale)
    about = provenance("onnxruntime", "aiohttp", "websockets", "redis")
    return msgspec.structs.replace(found, theme=_name(theme), provenance=about, seconds=time.monotonic() - began)


def run_apart(theme: str, quick: bool) -> bool:
    """Measure one theme in a process of its own; whether it went well."""
    tell(f"--- {theme}")
    command = [sys.executable, "-m", "tests.bench.failover", "--only", theme, *(["--quick"] if quick else [])]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == 0


def page(found: list[Found]) -> list[str]:
    """docs/benchmarks/failover.md."""
    lines = [
        "# Answers that survive",
        "",
        "Written by `make bench-failover`. Candidates were measured in turn within one run; median and range.",
        "",
    ]
    for each in found:
        lines += [f"## {each.title}", "", *(f"- {note}" for note in (each.provenance, *each.notes))]
        lines += ["", "| | target | median | range | | met |", "|---|---|---|---|---|---|"]
        lines += [*(row.text() for row in each.rows), ""]
    missed = [row.what for each in found for row in each.rows if row.target and not row.target.met(row.median)]
    return [*lines, f"Targets missed: {'; '.join(missed) if missed else 'none'}."]


def _name(theme: str) -> str:
    """Under which its findings are kept, beside those of other benches."""
    return f"failover-{theme}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="themes, separated by commas")
    parser.add_argument("--quick", action="store_true", help="small sizes, no page")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
