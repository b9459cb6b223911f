"""Fleets of real processes, and their logs beside every failure."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from export.recipes import Recipe
from tests.e2e.disasters import NEVER_S, WiredFleet, wired_fleet
from tests.e2e.processes import READY_S, Fleet, Process, Router, build_fleet, free_port
from tests.e2e.scripted import write_release
from tests.e2e.waiting import eventually
from tests.tools.gpt_oss_checkpoint import FULL, TINY

LINES_SHOWN = 80
TEST_LIMIT_S = 300
HERE = Path(__file__).parent


class MakeFleet(Protocol):
    """What the fixture `make_fleet` gives: a started fleet of one's own, for tests that break things."""

    def __call__(
        self,
        *,
        nodes: Sequence[str] = ("eu", "us"),
        consul: bool = True,
        edge: Mapping[str, str] | None = None,
        router: Mapping[str, str] | None = None,
        start: bool = True,
    ) -> Fleet: ...


@pytest.fixture(scope="session")
def fleet(smollm2_release: Path, consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Consul, nodes `eu` and `us`, a router: shared by all tests that leave it as it was."""
    shared = build_fleet(smollm2_release, tmp_path_factory.mktemp("fleet"), consul_binary)
    try:
        yield shared.start()
    finally:
        shared.close()


@pytest.fixture
def make_fleet(smollm2_release: Path, consul_binary: Path, tmp_path: Path) -> Iterator[MakeFleet]:
    """A factory of fleets for this test alone; they end with it."""
    made: list[Fleet] = []

    def make(
        *,
        nodes: Sequence[str] = ("eu", "us"),
        consul: bool = True,
        edge: Mapping[str, str] | None = None,
        router: Mapping[str, str] | None = None,
        start: bool = True,
    ) -> Fleet:
        binary = consul_binary if consul else None
        own = build_fleet(
            smollm2_release, tmp_path / f"fleet-{len(made)}", binary, nodes=nodes, edge=edge, router=router
        )
        made.append(own)
        return own.start() if start else own

    yield make
    for own in made:
        own.close()


@pytest.fixture(scope="session")
def tiny_gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release of a gpt-oss with four small layers under the genuine vocabulary."""
    return write_release(tmp_path_factory.mktemp("tiny"), replace(TINY, vocab=FULL.vocab), Recipe.CPU_INT8)


@pytest.fixture(scope="session")
def _three_nodes(smollm2_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WiredFleet]:
    edge = {"EDGE__NODE__DRAIN_S": NEVER_S}
    shared = wired_fleet(smollm2_release, tmp_path_factory.mktemp("three"), ("eu", "us", "asia"), edge=edge)
    try:
        shared.start()
        yield shared
    finally:
        shared.close()


@pytest.fixture
def three_nodes(_three_nodes: WiredFleet) -> WiredFleet:
    """Nodes `eu`, `us` and `asia` on wires, and a router: shared by tests that break them, whole for each of them."""
    _three_nodes.mend()
    return _three_nodes


class MakeRouter(Protocol):
    """What the fixture `make_router` gives: one more router that shares nodes of `three_nodes`, as a fleet."""

    def __call__(
        self,
        name: str,
        *,
        nodes: Sequence[str] = ...,
        settings: Mapping[str, str] | None = None,
        port: int = 0,
    ) -> Fleet: ...


@pytest.fixture
def make_router(three_nodes: WiredFleet, tmp_path: Path) -> Iterator[MakeRouter]:
    """A factory of routers for this test alone, on a port that was chosen before or any."""
    made: list[Router] = []

    def make(
        name: str,
        *,
        nodes: Sequence[str] = ("eu", "us", "asia"),
        settings: Mapping[str, str] | None = None,
        port: int = 0,
    ) -> Fleet:
        chosen = {node: three_nodes.node(node) for node in nodes}
        own = {"ROUTER__STORE__PATH": str(tmp_path / f"{name}.sqlite"), **(settings or {})}
        router = Router(three_nodes.folder, name=name, nodes=list(chosen.values()), settings=own)
        router.ports = (port or free_port(),)
        made.append(router)
        router.start().wait_ready()
        fleet = Fleet(None, dict(chosen), router)
        eventually(fleet.all_ready, READY_S, f"the router {name} sees its nodes")
        return fleet

    yield make
    for router in made:
        router.close()


@pytest.fixture(autouse=True)
def _restore_the_shared_fleet(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hold tests to their word: the shared fleet is as complete after a test as before."""
    yield
    if "fleet" in request.fixturenames:
        shared: Fleet = request.getfixturevalue("fleet")
        dead = [process.name for process in shared.processes() if not process.running]
        assert not dead, f"this test ended {dead} of the shared fleet: let it use make_fleet"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder `e2e`, with a limit that two busy cores do not reach."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("e2e")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TEST_LIMIT_S))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the logs of the processes beside the report of a failure."""
    report = yield
    if report.failed:
        for process in dict.fromkeys(Process.started):
            state = "running" if process.running else f"ended with {process.exit_code}"
            report.sections.append((f"log of {process.name} ({state})", process.log(LINES_SHOWN)))
    return report
