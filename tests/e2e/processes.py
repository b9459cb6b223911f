"""Real processes for end-to-end tests: Consul, nodes, routers, on ports that happen to be free.

They are started from the test's main thread and die with it, even if it is killed (scripts/supervisor/child.py).
Nothing here knows what the services do, beyond their configuration keys, `/readyz` and `/fleet`.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import psutil

from scripts.supervisor import plan
from scripts.supervisor.host import bind_error
from scripts.supervisor.run import is_ready
from tests.e2e.waiting import eventually, http

ROOT = Path(__file__).resolve().parent.parent.parent
HOST = "127.0.0.1"
READY_S = 120.0
"""A generous limit, never a measure: two busy cores may take long to load a model."""
ATTEMPTS = 3
LAST_WORDS_S = 5.0
"""How long to read on after the end: what it started may live a little longer and hold the pipe open."""
LOG_LINES = 2000

_given_ports: set[int] = set()


def free_port() -> int:
    """Find a port of loopback that nobody listens on and that was not given out before."""
    while True:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port: int = probe.getsockname()[1]
        if port not in _given_ports:
            _given_ports.add(port)
            return port


class Process:
    """One real process. Invariant: what it starts is in its process group and gone after `close`.

    Subclasses say what runs (`argv`, `env`), on which ports, and where it says that it is ready.
    """

    ports_needed = 1
    started: ClassVar[collections.deque[Process]] = collections.deque(maxlen=64)
    """The latest processes of all tests, for the report of a failed one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ports: tuple[int, ...] = ()
        self._popen: subprocess.Popen[bytes] | None = None
        self._lines: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
        self._reader: threading.Thread | None = None

    def argv(self) -> Sequence[str]:
        """Return the command."""
        raise NotImplementedError

    def env(self) -> Mapping[str, str]:
        """Return what is added to the environment."""
        return {}

    @property
    def ready_path(self) -> str:
        """The path that answers 200 when the process is ready."""
        return "/readyz"

    @property
    def port(self) -> int:
        """The port that the process is spoken to on."""
        return self.ports[0]

    @property
    def url(self) -> str:
        """The address of that port, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the latest life."""
        assert self._popen is not None, f"{self.name} was never started"
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Tell whether the process lives."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def ready(self) -> bool:
        """Tell whether it says that it is ready."""
        return self.running and is_ready(self.url + self.ready_path)

    def start(self) -> Self:
        """Start it without waiting; a later life has the same ports.

        Main thread only: PDEATHSIG binds to the thread.
        """
        assert threading.current_thread() is threading.main_thread(), "start processes from the main thread"
        assert not self.running, f"{self.name} runs already"
        self._sweep()
        if not self.ports:
            self.ports = tuple(free_port() for _ in range(self.ports_needed))
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "scripts.supervisor.child", str(os.getpid()), *self.argv()],
            cwd=ROOT,
            env={**clean_environment(), **self.env()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._lines.append(f"--- {self.name} started, pid {self.pid}, ports {self.ports}")
        self._reader = threading.Thread(target=self._read, args=(self._popen,), daemon=True)
        self._reader.start()
        Process.started.append(self)
        return self

    def wait_ready(self, timeout_s: float = READY_S) -> Self:
        """Wait until it is ready. If somebody took one of its ports in the meantime, it gets others and starts anew.

        Raises AssertionError, with its log, if it ends or does not get ready.
        """
        for _ in range(ATTEMPTS):
            eventually(lambda: self.ready or not self.running, timeout_s, f"{self.name} gets ready\n{self.log()}")
            if self.running:
                return self
            if not any(bind_error(port) == errno.EADDRINUSE for port in self.ports):
                break
            self.ports = ()
            self.start()
        raise AssertionError(f"{self.name} ended with {self.exit_code} instead of getting ready:\n{self.log()}")

    @property
    def exit_code(self) -> int | None:
        """What it ended with: negative for a signal, None while it lives."""
        return None if self._popen is None else self._popen.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this one process, not to what it started."""
        assert self.running, f"{self.name} is gone already"
        os.kill(self.pid, number)

    def kill(self) -> None:
        """`kill -9` this one process, and see it gone."""
        self.signal(signal.SIGKILL)
        self.wait_exit()

    def stop(self, timeout_s: float = 20.0) -> int:
        """Ask it to end (SIGTERM) and return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait_exit(timeout_s)

    def wait_exit(self, timeout_s: float = 20.0) -> int:
        """Wait for its end and its last words; return its exit code."""
        assert self._popen is not None and self._reader is not None, f"{self.name} was never started"
        try:
            code = self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {timeout_s:g} s:\n{self.log()}") from None
        self._reader.join(LAST_WORDS_S)
        return code

    def restart(self) -> Self:
        """Start it again after its end, on the same ports, and wait until it is ready."""
        return self.start().wait_ready()

    def children(self) -> list[psutil.Process]:
        """Return the processes it has started that live, theirs included."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [p for p in psutil.Process(self.pid).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
        return []

    def log(self, lines: int = LOG_LINES) -> str:
        """Return the latest lines that it printed."""
        return "\n".join(list(self._lines)[-lines:])

    def close(self) -> None:
        """End it and everything it started; does nothing the second time."""
        if self._popen is None:
            return
        self._sweep()
        self._popen.wait()
        if self._reader is not None:
            self._reader.join()

    def _sweep(self) -> None:
        """Kill what is left of the latest life, and what it started."""
        if self._popen is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as source:
            for line in source:
                self._lines.append(line.decode(errors="replace").rstrip())


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what would configure the services behind the tests' back."""
    foreign = ("EDGE__", "ROUTER__", "CONSUL")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "PYTHONUNBUFFERED": "1", "ORT_DISABLE_TELEMETRY": "1", "NO_PROXY": HOST, "no_proxy": HOST}


class Consul(Process):
    """A real agent, its data in memory: killed and started again it has forgotten everything."""

    ports_needed = 4
    ready_path = "/v1/status/leader"

    def __init__(self, binary: Path, name: str = "consul") -> None:
        super().__init__(name)
        words = subprocess.run([binary, "version"], capture_output=True, text=True, check=True).stdout
        self._own = plan.OwnConsul(str(binary), plan.consul_version(words))

    def argv(self) -> Sequence[str]:
        """Return the command that `make up` uses too."""
        return plan.consul(str(ROOT), self.ports, self._own).argv

    def healthy(self, service: str) -> list[dict[str, Any]]:
        """Return the instances of a service whose checks pass, as Consul describes them."""
        found = http(f"{self.url}/v1/health/service/{service}?passing=true", key=None).json()
        return [entry["Service"] for entry in found]


class Redis(Process):
    """A real Redis that keeps what it is told in `folder`, as routers need it."""

    def __init__(self, folder: Path) -> None:
        super().__init__("redis")
        self._folder = folder

    def argv(self) -> Sequence[str]:
        """Return the command; only this machine reaches it."""
        where = ["--bind", HOST, "--port", str(self.port), "--dir", str(self._folder)]
        return ["redis-server", *where, "--save", "", "--appendonly", "yes"]

    @property
    def ready(self) -> bool:
        """Tell whether it says that it is ready: it speaks no HTTP."""
        return self.running and "Ready to accept connections" in self.log()

    @property
    def redis_url(self) -> str:
        """The address for routers."""
        return f"redis://{HOST}:{self.port}/0"


class Node(Process):
    """One edge node: a parent, and the child with the engine."""

    def __init__(
        self,
        name: str,
        release: Path,
        folder: Path,
        *,
        region: str | None = None,
        consul: Consul | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name)
        self.region = region or name
        self._release = release
        self._folder = folder
        self._consul = consul
        self._settings = dict(settings or {})

    def argv(self) -> Sequence[str]:
        """Return the command that an operator uses."""
        return [sys.executable, "-m", "edge_node", "--config", "configs/edge.toml"]

    def env(self) -> Mapping[str, str]:
        """Return the keys that differ from configs/edge.toml.

        One thread: two nodes and the test share two cores. A short context: its cache is soon set up.
        """
        return {
            "EDGE__NODE__NAME": self.name,
            "EDGE__NODE__REGION": self.region,
            "EDGE__NODE__RELEASE": str(self._release),
            "EDGE__LISTEN__HOST": HOST,
            "EDGE__LISTEN__PORT": str(self.port),
            "EDGE__LINK__SECRET_FILE": str(link_secret(self._folder)),
            "EDGE__DISCOVERY__CONSUL": self._consul.url if self._consul else "",
            "EDGE__ENGINE__THREADS": "1",
            "EDGE__ENGINE__CONTEXT_TOKENS": "2048",
            **self._settings,
        }

    @property
    def link_url(self) -> str:
        """The address for a router's static list."""
        return f"ws://{HOST}:{self.port}"

    def engine(self) -> psutil.Process:
        """Return the child that runs the engine. Raises LookupError while there is none."""
        for child in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "edge_node.runtime.worker" in child.cmdline():
                    return child
        raise LookupError(f"{self.name} (pid {self.pid}) has no engine child")

    def kill_engine(self) -> int:
        """`kill -9` the engine child; return the pid that it had."""
        engine = self.engine()
        engine.kill()
        return engine.pid


class Router(Process):
    """One router."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "local",
        nodes: Sequence[Node] = (),
        consul: Consul | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """With a Consul the static list is empty; without one it holds `nodes`, where they listen at the start."""
        super().__init__(f"router-{name}")
        self._router_name = name
        self._folder = folder
        self._nodes = tuple(nodes)
        self._consul = consul
        self._settings = dict(settings or {})

    def argv(self) -> Sequence[str]:
        """Return the command that an operator uses."""
        return [sys.executable, "-m", "router", "--config", "configs/router.toml"]

    def env(self) -> Mapping[str, str]:
        """Return the keys that differ from configs/router.toml."""
        static = [] if self._consul else [node.link_url for node in self._nodes]
        return {
            "ROUTER__ROUTER__NAME": self._router_name,
            "ROUTER__LISTEN__HOST": HOST,
            "ROUTER__LISTEN__PORT": str(self.port),
            "ROUTER__LINK__SECRET_FILE": str(link_secret(self._folder)),
            "ROUTER__DISCOVERY__CONSUL": self._consul.url if self._consul else "",
            "ROUTER__DISCOVERY__STATIC": json.dumps(static),
            "ROUTER__STORE__PATH": str(self._folder / f"{self.name}.sqlite"),
            "ROUTER__DEFAULTS__MAX_OUTPUT_TOKENS": "64",
            **self._settings,
        }

    def fleet(self) -> list[dict[str, Any]]:
        """Return the nodes as `/fleet` lists them."""
        answer = http(f"{self.url}/fleet")
        assert answer.status == 200, answer
        nodes: list[dict[str, Any]] = answer.json()["nodes"]
        return nodes


def link_secret(folder: Path) -> Path:
    """Return the file with the secret that a fleet's processes share, written on first use."""
    path = folder / "link-secret"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32) + "\n")
    return path


@dataclass(slots=True)
class Fleet:
    """Consul (if any), nodes and a router that work together."""

    consul: Consul | None
    nodes: dict[str, Node]
    router: Router

    @property
    def url(self) -> str:
        """The router's address, e.g. for the chat page."""
        return self.router.url

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes as its base_url."""
        return f"{self.router.url}/v1"

    def node(self, name: str) -> Node:
        """Return the node of this name, e.g. the one that a response header named."""
        return self.nodes[name]

    def processes(self) -> Iterator[Process]:
        """Yield those in front first: the order in which they are ended."""
        yield self.router
        yield from self.nodes.values()
        if self.consul is not None:
            yield self.consul

    def start(self) -> Self:
        """Start everything and wait until the router sees every node ready."""
        if self.consul is not None:
            self.consul.start().wait_ready()
        for node in self.nodes.values():
            node.start()
        for node in self.nodes.values():
            node.wait_ready()
        self.router.start().wait_ready()
        eventually(self.all_ready, READY_S, "the router sees all nodes ready")
        return self

    def all_ready(self) -> bool:
        """Tell whether the router lists every node as ready."""
        ready = {node["name"] for node in self.router.fleet() if node["state"] == "ready"}
        return ready >= set(self.nodes)

    def close(self) -> None:
        """End everything."""
        for process in self.processes():
            process.close()


def build_fleet(
    release: Path,
    folder: Path,
    consul_binary: Path | None,
    *,
    nodes: Sequence[str] = ("eu", "us"),
    edge: Mapping[str, str] | None = None,
    router: Mapping[str, str] | None = None,
) -> Fleet:
    """Put a fleet together without starting it; with no Consul binary the router gets a static list.

    `edge` and `router` are further keys, e.g. {"EDGE__ENGINE__SLOTS": "2"}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    consul = Consul(consul_binary) if consul_binary else None
    made = {name: Node(name, release, folder, consul=consul, settings=edge) for name in nodes}
    return Fleet(consul, made, Router(folder, nodes=list(made.values()), consul=consul, settings=router))
