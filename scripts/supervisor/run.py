"""Carry out what the machine decides: start, watch, ask, signal and print. Knows no reason for any of it."""

from __future__ import annotations

import contextlib
import http.client
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import assert_never

from scripts.supervisor.machine import (
    Answered,
    Event,
    Exited,
    Interrupted,
    Kill,
    Leave,
    Say,
    Start,
    Stop,
    Supervisor,
    Ticked,
    Welcome,
)
from scripts.supervisor.plan import Process

TICK_S = 0.1
ASK_EVERY_S = 0.3
ASK_TIMEOUT_S = 2.0
LONGEST_LINE_BYTES = 64 * 1024
COLOURS = (36, 32, 33, 35, 34, 96, 92, 93, 95, 94)


class Console:
    """Lines of several processes on one stdout, each with its owner's name; never half a line."""

    def __init__(self, names: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._width = max(len(name) for name in (*names, "up"))
        coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)} if coloured else {}
        self.broken = False

    def line(self, name: str, text: str) -> None:
        """Print one line under a name; notes in `broken` when nobody reads any more."""
        head = f"{name:>{self._width}} |"
        if name in self._colours:
            head = f"\x1b[{self._colours[name]}m{head}\x1b[0m"
        self.raw(f"{head} {text}")

    def raw(self, text: str) -> None:
        """Print text as it is."""
        with self._lock:
            try:
                print(text, flush=True)
            except BrokenPipeError:
                # Nobody reads any more. What is still to be said goes nowhere, so that the end is not noisy.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                self.broken = True


class Runner:
    """The processes of one fleet. Invariant: after `run` returns none of them, nor of their children, is left."""

    def __init__(self, processes: Sequence[Process], welcome: str, root: str) -> None:
        self._plan = {process.name: process for process in processes}
        self._welcome = welcome
        self._root = root
        self._console = Console(list(self._plan))
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._awaited: Mapping[str, int] = {}
        self._left = False

    def run(self) -> None:
        """Keep the fleet running until a signal ends it; main thread only, for signals and PDEATHSIG."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: self._events.put(Interrupted()))
        machine = Supervisor({name: process.after for name, process in self._plan.items()}, time.monotonic())
        threading.Thread(target=self._ask, daemon=True).start()
        try:
            self._step(machine, Ticked())
            while not self._left:
                self._step(machine, self._next_event())
                for event in self._collect():
                    self._step(machine, event)
        finally:
            for name in list(self._running):
                self._sweep(name)

    def _next_event(self) -> Event:
        try:
            return self._events.get(timeout=TICK_S)
        except queue.Empty:
            return Ticked()

    def _step(self, machine: Supervisor, event: Event) -> None:
        for effect in machine.on(event, time.monotonic()):
            match effect:
                case Start(name, _):
                    self._start(name)
                case Stop(name):
                    self._signal(name, signal.SIGTERM)
                case Kill(name):
                    self._sweep(name)
                case Say(text):
                    self._console.line("up", text)
                case Welcome():
                    self._console.raw(self._welcome)
                case Leave():
                    self._left = True
                case _:
                    assert_never(effect)
        self._awaited = machine.awaited()

    def _start(self, name: str) -> None:
        process = self._plan[name]
        # A session of its own: Ctrl-C reaches this supervisor alone, and the whole group can be killed.
        started = subprocess.Popen(
            [sys.executable, "-m", "scripts.supervisor.child", str(os.getpid()), *process.argv],
            cwd=self._root,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **process.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._running[name] = started
        threading.Thread(target=self._relay, args=(name, started), daemon=True).start()

    def _collect(self) -> list[Event]:
        """Reap what has ended, and sweep what it may have left in its group."""
        events: list[Event] = []
        for name, process in list(self._running.items()):
            code = process.poll()
            if code is not None:
                self._sweep(name)
                del self._running[name]
                events.append(Exited(name, how(code)))
        if self._console.broken and not self._left:
            self._console.broken = False
            events.append(Interrupted())
        return events

    def _signal(self, name: str, number: signal.Signals) -> None:
        if name in self._running:  # else it has just ended, and the machine is about to hear of it
            self._running[name].send_signal(number)

    def _sweep(self, name: str) -> None:
        """Kill a process and everything it has started."""
        if name in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running[name].pid, signal.SIGKILL)

    def _relay(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Copy a process's output line by line until it ends; an endless line is cut into pieces."""
        assert process.stdout is not None
        with process.stdout as source:
            while line := source.readline(LONGEST_LINE_BYTES):
                self._console.line(name, line.decode(errors="replace").rstrip("\r\n"))

    def _ask(self) -> None:
        """Ask everything that is awaited whether it is ready, for as long as this process lives."""
        while True:
            for name, life in self._awaited.items():
                if is_ready(self._plan[name].ready_url):
                    self._events.put(Answered(name, life))
            time.sleep(ASK_EVERY_S)


def is_ready(url: str) -> bool:
    """Tell whether `url` answers 200 with anything but an empty JSON string (Consul's word for 'no leader yet')."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is never behind a proxy
    try:
        with opener.open(url, timeout=ASK_TIMEOUT_S) as answer:
            return bool(answer.status == 200 and answer.read(4096).strip() != b'""')
    except (OSError, urllib.error.URLError, http.client.HTTPException):
        return False


def how(code: int) -> str:
    """Put a return code of subprocess into words."""
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"
