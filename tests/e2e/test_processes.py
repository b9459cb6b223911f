"""The harness itself: a wrong harness makes every other end-to-end test lie."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.e2e.processes import ROOT, Consul, Process, free_port
from tests.e2e.waiting import eventually, eventually_async, http
from tests.e2e.wire import Wire


@pytest.fixture
def consul(consul_binary: Path) -> Iterator[Consul]:
    agent = Consul(consul_binary)
    yield agent.start().wait_ready()
    agent.close()


class Listener(Process):
    """Listens on its port, or ends at once if somebody else does; has a child."""

    ready_path = "/"

    def argv(self) -> Sequence[str]:
        """Return a small HTTP server."""
        code = (
            "import subprocess, sys, http.server; subprocess.Popen(['sleep', '1000']);"
            f"http.server.HTTPServer(('127.0.0.1', {self.port}), http.server.SimpleHTTPRequestHandler).serve_forever()"
        )
        return [sys.executable, "-c", code]


def test_a_real_consul_serves_and_forgets_when_it_is_killed(consul: Consul) -> None:
    service = {"Name": "edgechat-node", "ID": "a", "Port": 1}
    assert http(f"{consul.url}/v1/agent/service/register", method="PUT", body=service).status == 200
    assert [found["ID"] for found in eventually(lambda: consul.healthy("edgechat-node"))] == ["a"]
    consul.kill()
    assert consul.exit_code == -signal.SIGKILL
    consul.restart()
    assert consul.healthy("edgechat-node") == []


def test_nothing_survives_close() -> None:
    process = Listener("listener").start().wait_ready()
    family = [psutil.Process(process.pid), *process.children()]
    assert len(family) == 2
    process.close()
    eventually(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))


def test_a_process_whose_port_was_taken_meanwhile_gets_another() -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen(1)
        taken = squatter.getsockname()[1]
        process = Listener("listener")
        process.ports = (taken,)
        try:
            process.start().wait_ready()
            assert process.port != taken
            assert len(process.children()) == 1
        finally:
            process.close()


def test_a_process_that_ends_at_once_is_reported_with_its_last_words() -> None:
    class Doomed(Process):
        def argv(self) -> Sequence[str]:
            return [sys.executable, "-c", "raise SystemExit('the release is damaged')"]

    with pytest.raises(AssertionError, match=r"ended with 1 instead of getting ready:[\s\S]*the release is damaged"):
        Doomed("doomed").start().wait_ready()


def test_processes_die_with_the_test_that_started_them() -> None:
    code = (
        "from tests.e2e.test_processes import Listener\n"
        "print(Listener('listener').start().wait_ready().pid, flush=True)\n"
        "import signal; signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as test:
        assert test.stdout is not None
        listener = psutil.Process(int(test.stdout.readline()))
        strays = listener.children()
        test.kill()
        eventually(lambda: not listener.is_running() or listener.status() == psutil.STATUS_ZOMBIE)
        for stray in strays:
            stray.kill()


def test_no_port_is_given_out_twice() -> None:
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == len(ports)


def test_what_never_comes_true_is_named_with_its_last_error() -> None:
    def nothing_listens() -> bool:
        raise ConnectionRefusedError("nobody there")

    with pytest.raises(AssertionError, match="not within 0 s: somebody listens") as failure:
        eventually(nothing_listens, 0, "somebody listens")
    assert isinstance(failure.value.__cause__, ConnectionRefusedError)


async def test_the_async_form_waits_for_sync_and_async_predicates_alike() -> None:
    countdown = iter([0, 0, 3])

    async def ask() -> int:
        return next(countdown)

    assert await eventually_async(ask) == 3
    assert await eventually_async(os.getpid) == os.getpid()
    with pytest.raises(AssertionError, match=r"the moon is reached \(last value: 0\)"):
        await eventually_async(lambda: 0, 0, "the moon is reached")


def test_a_wire_passes_bytes_unless_it_is_cut_or_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        wire = Wire(lambda: int(server.getsockname()[1]))
        with socket.create_connection(("127.0.0.1", wire.port)) as near, server.accept()[0] as far:
            near.settimeout(0.2)
            far.sendall(b"one")
            assert near.recv(8) == b"one"
            wire.silence()
            far.sendall(b"two")
            with pytest.raises(TimeoutError):
                near.recv(8)
            wire.heal()
            near.settimeout(30)
            assert near.recv(8) == b"two"
            wire.cut()
            with pytest.raises(ConnectionResetError):
                near.recv(8)
        wire.heal()
        with socket.create_connection(("127.0.0.1", wire.port)) as near, server.accept()[0] as far:
            near.sendall(b"three")
            assert far.recv(8) == b"three"
        wire.close()
