"""scripts/up with real processes, whose services are stand-ins that listen and say that they are ready."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from scripts.supervisor.host import check_ports, make_secret
from scripts.supervisor.plan import PlanError
from scripts.supervisor.plan import Process as PlannedProcess
from tests.e2e.processes import ROOT
from tests.e2e.up import Up, all_gone
from tests.e2e.waiting import eventually

STAND_IN = """
import http.server, os, signal, subprocess, sys
keys = {key: value for key, value in os.environ.items() if key.startswith(("EDGE__", "ROUTER__"))}
port = int(next(value for key, value in keys.items() if key.endswith("__LISTEN__PORT")))
subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
signal.signal(signal.SIGTERM, lambda *_: None if "DEAF" in os.environ else sys.exit(0))
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *words):
        pass
http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
"""


class MakeUp:
    """Starts Ups in a scratch copy of the scripts and ends them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: list[Up] = []
        shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "configs/consul", root / "configs/consul")
        for package in ("edge_node", "router"):
            (root / package).mkdir()
            (root / package / "__main__.py").write_text(STAND_IN)
        (root / "releases/smollm2-135m").mkdir(parents=True)
        (root / "releases/smollm2-135m/manifest.json").write_text('{"model": "smollm2-135m"}')

    def __call__(self, *arguments: str, **environment: str) -> Up:
        up = Up(self.root, arguments or ("--static",), environment)
        self.made.append(up)
        up.start()
        return up


@pytest.fixture
def make_up(tmp_path: Path) -> Iterator[MakeUp]:
    make = MakeUp(tmp_path)
    yield make
    for up in make.made:
        family = up.everything() if up.running else []
        up.close()
        for stray in family:  # the stand-ins, unlike the real node, do not look after their children
            with contextlib.suppress(psutil.NoSuchProcess):
                stray.kill()


def test_up_starts_two_nodes_and_a_router_and_says_where(make_up: MakeUp) -> None:
    up = make_up()
    eventually(up.welcomed)
    assert set(up.services()) == {"router", "eu", "us"}
    assert f"http://127.0.0.1:{up.port}/v1" in up.log()
    secret = make_up.root / "data/link-secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}\n", secret.read_text())


def test_a_process_that_dies_is_started_again(make_up: MakeUp) -> None:
    up = make_up()
    eventually(up.welcomed)
    victim = up.services()["eu"]
    family = [victim, *victim.children(recursive=True)]
    victim.kill()
    eventually(lambda: "eu is ready again" in up.log())
    assert "eu ended by SIGKILL after" in up.log()
    assert up.services()["eu"].pid != victim.pid
    eventually(lambda: all_gone(family), what="what the dead process had started is gone too")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_leaves_no_process_behind(make_up: MakeUp, number: signal.Signals) -> None:
    up = make_up()
    eventually(up.welcomed)
    family = up.everything()
    up.signal(number)
    assert up.wait_exit() == 0
    eventually(lambda: all_gone(family))


def test_the_second_ctrl_c_does_not_wait_for_the_deaf(make_up: MakeUp) -> None:
    up = make_up(DEAF="1")
    eventually(up.welcomed)
    family = up.everything()
    up.signal(signal.SIGINT)
    eventually(lambda: "stopping" in up.log())
    up.signal(signal.SIGINT)
    assert up.wait_exit() == 0
    assert "killing eu, us, router" in up.log()
    eventually(lambda: all_gone(family))


def test_when_the_supervisor_itself_is_killed_the_services_end(make_up: MakeUp) -> None:
    up = make_up()
    eventually(up.welcomed)
    services = list(up.services().values())
    strays = [child for service in services for child in service.children()]
    up.kill()
    eventually(lambda: all_gone(services), what="the services have ended")
    for stray in strays:
        stray.kill()


def test_a_command_that_cannot_run_is_tried_again_and_named(make_up: MakeUp) -> None:
    (make_up.root / "edge_node/__main__.py").write_text("raise SystemExit('edge_node: no such release')")
    up = make_up()
    eventually(lambda: "eu ended with exit code 1" in up.log() and "starting it again in 1 s" in up.log())
    assert "eu | edge_node: no such release" in up.log()
    assert not up.welcomed()


def test_a_real_consul_is_started_beside_the_services(make_up: MakeUp, consul_binary: Path) -> None:
    up = make_up("--nodes", "eu,us", CONSUL=str(consul_binary))
    eventually(up.welcomed)
    assert f"found by Consul, http://127.0.0.1:{up.port + 10}/ui/" in up.log()
    assert "No Consul" not in up.log()
    family = up.everything()
    up.signal(signal.SIGINT)
    assert up.wait_exit() == 0
    eventually(lambda: all_gone(family))


def test_without_consul_the_fall_back_is_said_loudly(make_up: MakeUp, tmp_path: Path) -> None:
    tools = {name: shutil.which(name) for name in ("bash", "dirname", "env")}
    (tmp_path / "bin").mkdir()
    for name, path in tools.items():
        assert path is not None
        (tmp_path / "bin" / name).symlink_to(path)
    up = make_up("--nodes", "eu", PATH=str(tmp_path / "bin"))
    eventually(lambda: "No Consul found" in up.log() and "make consul" in up.log())
    eventually(up.welcomed)


def test_a_taken_port_is_named_with_a_way_out_before_anything_starts(make_up: MakeUp) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen(1)
        port = squatter.getsockname()[1]
        planned = PlannedProcess("eu", (), {}, "", (port,))
        with pytest.raises(PlanError, match=rf"port {port} \(for eu\) is taken: .* PORT=\d+ make up"):
            check_ports([planned], port - 1)
    up = make_up()
    eventually(up.welcomed)
    second = Up(make_up.root, ("--static",), {})
    second.ports = up.ports
    second.start()
    try:
        assert second.wait_exit() == 2
        eventually(lambda: f"port {up.port + 1} (for eu) is taken" in second.log())
        assert "Traceback" not in second.log()
    finally:
        second.close()


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--static"], {"PORT": "eighty"}, "PORT=eighty is no port"),
        (["--static"], {"PORT": "70000"}, "PORT=70000 cannot be used"),
        (["--nodes", "eu"], {"CONSUL": "/nowhere/consul"}, "CONSUL=/nowhere/consul is no program"),
        (["--nodes", "eu"], {"CONSUL": sys.executable}, "check CONSUL="),
        (["--static", "--release", "/nowhere"], {}, "no release in /nowhere"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    make_up: MakeUp, arguments: list[str], environment: dict[str, str], words: str
) -> None:
    up = Up(make_up.root, arguments, environment)
    if "PORT" in environment:
        up.argv = lambda: [sys.executable, str(make_up.root / "scripts/up"), *arguments]  # type: ignore[method-assign]
    up.start()
    try:
        assert up.wait_exit() == 2
        eventually(lambda: words in up.log())
        assert len(up.log().splitlines()) == 2  # the harness's own line, and the sentence
    finally:
        up.close()


def test_the_link_secret_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "data/link-secret"
    make_secret(path)
    first = path.read_text()
    make_secret(path)
    assert path.read_text() == first
    assert os.listdir(path.parent) == ["link-secret"]
