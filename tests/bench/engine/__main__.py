"""`make bench-engine`: the targets of the engine, measured. Writes docs/benchmarks/engine.md.

    python -m tests.bench.engine                    every theme, each in a process of its own
    python -m tests.bench.engine --only ttft,stall  these; the page keeps what the others found before
    python -m tests.bench.engine --resume           those that have found nothing at this commit yet
    python -m tests.bench.engine --quick            to see that it runs; figures mean nothing, no page is written

Candidates of a ratio alternate within one run; the machine should have nothing else to do.
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

THEMES = ("batch", "product", "ttft", "stall", "overload", "drafts", "neighbours", "memory", "sampler")
"""Modules beside this one; each has `measure`."""


class Theme(Protocol):
    """A module of this folder."""

    def measure(self, scale: Scale) -> Found: ...


def run(theme: str, scale: Scale) -> Found:
    """Measure one theme in this process."""
    module = cast(Theme, importlib.import_module(f"tests.bench.engine.{theme}"))
    began = time.monotonic()
    found = module.measure(scale)
    return msgspec.structs.replace(found, provenance=about(), seconds=time.monotonic() - began)


def about() -> str:
    return provenance("onnxruntime", "numpy", "aiohttp", "websockets")


def run_apart(theme: str, quick: bool) -> bool:
    """Measure one theme in a process of its own; whether it went well."""
    tell(f"--- {theme}")
    command = [sys.executable, "-m", "tests.bench.engine", "--only", theme, *(["--quick"] if quick else [])]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == 0


def page(found: list[Found]) -> list[str]:
    """docs/benchmarks/engine.md."""
    origins = {each.provenance for each in found}
    lines = [
        "# The engine",
        "",
        "Written by `make bench-engine`. Candidates of a ratio were measured in turn within one run; median and range.",
        "",
    ]
    if len(origins) == 1:
        lines += [f"- {origins.pop()}", ""]
        origins = set()
    for each in found:
        lines += [f"## {each.title}", ""]
        lines += [f"- {note}" for note in (*([each.provenance] if origins else []), *each.notes)]
        lines += ["", "| | target | median | range | | met |", "|---|---|---|---|---|---|"]
        lines += [*(row.text() for row in each.rows), ""]
    missed = [row.what for each in found for row in each.rows if row.target and not row.target.met(row.median)]
    return [*lines, f"Targets missed: {'; '.join(missed) if missed else 'none'}."]


def main() -> int:
    """Some or all themes; 1 if one of them failed."""
    options = _options()
    chosen = options.only.split(",") if options.only else list(THEMES)
    if unknown := [theme for theme in chosen if theme not in THEMES]:
        raise SystemExit(f"bench: there is no theme {unknown[0]!r}; there are {', '.join(THEMES)}.")
    failed = []
    if options.only and len(chosen) == 1:
        found = run(chosen[0], Scale(options.quick))
        if not options.quick:
            keep(found)
    else:
        for theme in chosen:
            if options.resume and ((before := kept(theme)) and before.provenance == about()):
                continue
            if not run_apart(theme, options.quick):
                failed.append(theme)
    if not options.quick:
        publish("engine.md", page([each for theme in THEMES if (each := kept(theme))]))
    if failed:
        tell(f"bench: failed: {', '.join(failed)}; `--only` runs one of them again.")
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="themes, separated by commas")
    parser.add_argument("--resume", action="store_true", help="leave out what this commit has measured already")
    parser.add_argument("--quick", action="store_true", help="small sizes, no page")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
