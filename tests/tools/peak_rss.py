"""Run a module as `python -m` does and tell the most memory it held, as the last line of stderr.

    python -m tests.tools.peak_rss export SOURCE --out FOLDER

Asked of the process itself: what a parent is told when a child has ended begins with the parent's own peak, which
outlives fork and exec.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SAYS = "peak_rss_kib="


def run_measured(module: str, arguments: Sequence[str]) -> float:
    """The peak in MiB of a module's run in a process of its own; raises CalledProcessError if it failed."""
    command = [sys.executable, "-m", "tests.tools.peak_rss", module, *arguments]
    said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return int(said.stderr.rpartition(_SAYS)[2]) / 1024


def _peak_kib() -> str:
    status = Path("/proc/self/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        print(f"{_SAYS}{_peak_kib()}", file=sys.stderr)
