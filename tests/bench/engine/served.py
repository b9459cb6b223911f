"""Something measured in a process of its own: a line of JSON asks, a line answers; in between it is idle."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.bench.report import ROOT


class Served:
    """A process that says {"ready": true} first."""

    def __init__(self, process: subprocess.Popen[str], command: Sequence[str]) -> None:
        self._process = process
        self._command = " ".join(command)
        self._answer()

    def ask(self, **fields: object) -> dict[str, Any]:
        """Its answer; raises SystemExit when it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The next line of JSON; libraries may print other things."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"bench: `{self._command}` ended; run it to see why.")


@contextmanager
def served(*command: str) -> Iterator[Served]:
    """Start it, wait until it is ready, kill it in the end."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield Served(process, command)
    finally:
        process.kill()
        process.wait()
