"""scripts/up as a process, and what it supervises."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from scripts.supervisor.host import is_free
from scripts.supervisor.plan import LAST_OFFSET
from tests.e2e.processes import Process, free_port


class Up(Process):
    """scripts/up in a folder of its own."""

    def __init__(self, root: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        super().__init__("up")
        self._root = root
        self._arguments = arguments
        self._environment = environment
        self.ports = (free_base(),)

    def argv(self) -> Sequence[str]:
        return [sys.executable, str(self._root / "scripts/up"), "--port", str(self.port), *self._arguments]

    def env(self) -> Mapping[str, str]:
        return self._environment

    def services(self) -> dict[str, psutil.Process]:
        """Return the processes that it supervises, by their port's distance from PORT."""
        try:
            direct = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return {}
        names = {self.port: "router", self.port + 1: "eu", self.port + 2: "us"}
        listening = {c.laddr.port: p for p in direct for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        return {name: listening[port] for port, name in names.items() if port in listening}

    def everything(self) -> list[psutil.Process]:
        """Return all processes below it."""
        return psutil.Process(self.pid).children(recursive=True)

    def welcomed(self) -> bool:
        return "edgechat is ready" in self.log()


def free_base() -> int:
    """Find a port with free ones above it for a whole fleet."""
    while not is_free(base := free_port() - LAST_OFFSET):
        pass
    return base


def all_gone(processes: Sequence[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)
