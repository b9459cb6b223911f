"""The node as it is run: real parent, real exec'd engine process, the real small model."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import psutil
import pytest

from core.frames import Cancel, Done, Drain, Failed, Status, Tokens
from export.build import Order, export
from export.recipes import Recipe
from tests.e2e.processes import HOST, ROOT, Node, clean_environment
from tests.e2e.waiting import eventually
from tests.edge_node.fake_engine import RouterLink, dial, generate
from tests.export.tiny_gguf import TinyLlama

pytestmark = pytest.mark.e2e

LONG = 2000


def starting(release: Path, folder: Path, **node: str) -> Node:
    """A node whose link needs no secret, started; `node` are keys of [node]."""
    keys = {f"EDGE__NODE__{name}".upper(): value for name, value in node.items()}
    return Node("eu", release, folder, settings={"EDGE__LINK__SECRET_FILE": "", **keys}).start()


@pytest.fixture(scope="module")
def shared(smollm2_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that every test leaves serving."""
    process = starting(smollm2_release, tmp_path_factory.mktemp("node"), hang_s="3")
    try:
        yield process.wait_ready()
    finally:
        process.close()


@pytest.fixture
def node(smollm2_release: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Node]:
    """A node for one test, which may end it; the fixture's parameter is its drain_s."""
    process = starting(smollm2_release, tmp_path, drain_s=getattr(request, "param", "0.1"))
    try:
        yield process.wait_ready()
    finally:
        process.close()


async def status_where(link: RouterLink, **fields: object) -> Status:
    while True:
        status = await link.receive(Status)
        if all(getattr(status, name) == value for name, value in fields.items()):
            return status


async def ids_of(link: RouterLink, stream: str, given: Sequence[int] = ()) -> list[int]:
    """All output ids of a stream at its Done, those given included; every seq is exactly the next one."""
    ids = list(given)
    while True:
        match await link.next():
            case Tokens(rows):
                for row in rows:
                    if row.stream == stream:
                        assert row.seq == len(ids)
                        ids.extend(row.ids)
            case Done() as done if done.stream == stream:
                assert done.usage.output_tokens == len(ids)
                return ids
            case Failed() as failed:
                raise AssertionError(failed.message)
            case _:
                pass


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def test_a_stream_that_continues_elsewhere_says_what_the_whole_one_said(shared: Node) -> None:
    async with dial(shared.port) as link:
        whole = generate("whole", release=link.hello.releases[0], max_output_tokens=12)
        await link.send(whole)
        ids = await ids_of(link, "whole")
        assert len(ids) == 12
        rest = msgspec.structs.replace(whole, stream="rest", epoch=2, output_ids=ids[:5])
        await link.send(rest)
        assert await ids_of(link, "rest", ids[:5]) == ids


async def test_a_killed_engine_is_restarted_and_its_streams_fail_retryably(shared: Node) -> None:
    async with dial(shared.port) as link:
        await status_where(link, state="ready", vouched=True)
        release = link.hello.releases[0]
        await link.send(generate("s", release=release, max_output_tokens=LONG))
        await link.receive(Tokens)
        killed = shared.kill_engine()
        failed = await link.receive(Failed)
        assert (failed.stream, failed.code, failed.retryable) == ("s", "engine_lost", True)
        status = await status_where(link, state="ready", vouched=True)
        assert status.engine_pid not in {0, killed}
        await link.send(generate("s", epoch=2, release=release, max_output_tokens=3))
        assert len(await ids_of(link, "s")) == 3


async def test_a_stopped_engine_is_not_vouched_for_then_killed_and_restarted(shared: Node) -> None:
    async with dial(shared.port) as link:
        stopped = (await status_where(link, state="ready", vouched=True)).engine_pid
        await link.send(generate("s", release=link.hello.releases[0], max_output_tokens=LONG))
        await link.receive(Tokens)
        shared.engine().suspend()
        await status_where(link, vouched=False, engine_pid=stopped)
        failed = await link.receive(Failed)
        assert (failed.stream, failed.code, failed.retryable) == ("s", "engine_stalled", True)
        await status_where(link, state="loading")
        assert gone(stopped)
        await status_where(link, state="ready", vouched=True)


async def test_the_streams_of_a_cut_link_are_cancelled(shared: Node) -> None:
    async with dial(shared.port) as watcher:
        await status_where(watcher, state="ready", vouched=True)
        async with dial(shared.port) as link:
            await link.send(generate("s", release=link.hello.releases[0], max_output_tokens=LONG))
            await status_where(watcher, running=1)
            link.connection.transport.abort()
        assert (await status_where(watcher, running=0)).load == 0.0


async def test_the_engine_ends_in_mid_answer_when_its_node_is_killed(node: Node) -> None:
    engine = node.engine().pid
    async with dial(node.port) as link:
        await link.send(generate("s", release=link.hello.releases[0], max_output_tokens=LONG))
        await link.receive(Tokens)
        node.kill()
    eventually(lambda: gone(engine))


async def test_a_node_that_is_asked_to_stop_leaves_nothing_behind(node: Node) -> None:
    engine = node.engine().pid
    async with dial(node.port) as link:
        await link.send(generate("s", release=link.hello.releases[0], max_output_tokens=LONG))
        await link.receive(Tokens)
        node.signal(signal.SIGTERM)
        assert (await link.receive(Failed)).code == "draining"
    assert node.wait_exit() == 0
    assert gone(engine)
    assert "Traceback" not in node.log()


@pytest.mark.parametrize("node", ["3600"], indirect=True)
async def test_a_node_that_is_asked_to_stop_goes_as_soon_as_its_last_stream_was_handed_off(node: Node) -> None:
    engine = node.engine().pid
    async with dial(node.port) as link:
        await link.send(generate("s", release=link.hello.releases[0], max_output_tokens=LONG))
        await link.receive(Tokens)
        node.signal(signal.SIGTERM)
        await link.receive(Drain)
        await link.receive(Tokens)
        await link.send(Cancel("s", 1))
        assert (await link.receive(Done)).finish == "cancelled"
    assert node.wait_exit() == 0
    assert gone(engine)


def test_a_node_that_is_asked_to_stop_while_it_loads_leaves_nothing_behind(
    smollm2_release: Path, tmp_path: Path
) -> None:
    process = starting(smollm2_release, tmp_path, drain_s="3600")
    try:
        engine = eventually(process.engine).pid
        process.signal(signal.SIGTERM)
        assert process.wait_exit() == 0
        eventually(lambda: gone(engine))
        assert "engine_ready" not in process.log()
        assert "Traceback" not in process.log()
    finally:
        process.close()


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("node", ["3600"], indirect=True)
async def test_a_second_signal_ends_the_node_at_once(node: Node, again: signal.Signals) -> None:
    engine = node.engine().pid
    async with dial(node.port) as link:
        await link.send(generate("s", release=link.hello.releases[0], max_output_tokens=LONG))
        await link.receive(Tokens)
        node.signal(signal.SIGTERM)
        await status_where(link, draining=True)
        node.signal(again)
        assert node.wait_exit() == 128 + again
    eventually(lambda: gone(engine))


# -- refusals at the start: one sentence, no traceback -------------------------------------------


def refused(release: Path, environ: Mapping[str, str], *options: str) -> tuple[int, str]:
    """Exit code and stderr of a node that is expected not to start."""
    command = [sys.executable, "-m", "edge_node", "--config", "configs/edge.toml", *options]
    least = {"EDGE__NODE__RELEASE": str(release), "EDGE__LISTEN__PORT": "0", "EDGE__ENGINE__THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env={**clean_environment(), **least, **environ}, capture_output=True, text=True, timeout=60
    )
    return result.returncode, result.stderr


def test_a_taken_port_is_said_in_one_line_before_anything_is_loaded(smollm2_release: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        code, said = refused(smollm2_release, {"EDGE__LISTEN__PORT": str(port)})
    assert code == 2
    assert said == f"{HOST}:{port} is taken by another process; set listen.port to a free port.\n"


def test_a_missing_release_is_said_in_one_line(tmp_path: Path) -> None:
    code, said = refused(tmp_path / "nowhere", {})
    assert code == 1
    assert said.count("\n") == 1
    assert "There is no release in" in said


@pytest.fixture
def damaged(smollm2_release: Path, tmp_path: Path) -> Path:
    """A copy of the release with one byte of its tokenizer changed."""
    copy = tmp_path / "damaged"
    shutil.copytree(smollm2_release, copy, copy_function=_link)
    tokenizer = copy / "tokenizer.json"
    data = bytearray(tokenizer.read_bytes())
    data[len(data) // 2] ^= 1
    tokenizer.unlink()
    tokenizer.write_bytes(data)
    return copy


def _link(source: str, target: str) -> None:
    """A hundred megabytes need not be copied to change one byte."""
    Path(target).symlink_to(Path(source).resolve())


def test_a_damaged_release_is_refused_with_the_file_and_one_sentence(damaged: Path) -> None:
    code, said = refused(damaged, {"EDGE__LOG__LEVEL": "error"})
    assert code == 1
    assert "tokenizer.json is damaged" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_verify_says_whether_a_release_is_intact(smollm2_release: Path, damaged: Path) -> None:
    assert refused(smollm2_release, {}, "--verify") == (0, "")
    code, said = refused(damaged, {}, "--verify")
    assert code == 1
    assert "tokenizer.json is damaged" in said


def test_check_config_says_what_is_wrong_and_starts_nothing(tmp_path: Path) -> None:
    assert refused(tmp_path, {}, "--check-config") == (0, "")
    code, said = refused(tmp_path, {"EDGE__ENGINE__SLOTZ": "4"}, "--check-config")
    assert code == 2
    assert said.startswith("EDGE__ENGINE__SLOTZ sets 'engine.slotz'")
    code, said = refused(tmp_path, {"EDGE__LINK__SECRET_FILE": "/none"}, "--check-config")
    assert (code, "'/none'" in said) == (2, True)


def test_a_secret_that_cannot_be_read_or_is_empty_is_refused(tmp_path: Path) -> None:
    code, said = refused(tmp_path, {"EDGE__LINK__SECRET_FILE": str(tmp_path / "none")})
    assert (code, said.count("\n")) == (2, 1)
    (tmp_path / "empty").write_text("\n")
    code, said = refused(tmp_path, {"EDGE__LINK__SECRET_FILE": str(tmp_path / "empty")})
    assert code == 2
    assert "is empty" in said


def test_a_release_for_another_device_is_refused(smollm2_release: Path) -> None:
    code, said = refused(smollm2_release, {"EDGE__ENGINE__DEVICE": "cuda", "EDGE__LOG__LEVEL": "error"})
    assert code == 1
    assert "is laid out for cpu, this node's device is cuda" in said.splitlines()[-1]


def test_cuda_that_onnx_runtime_would_not_use_is_refused(tmp_path: Path) -> None:
    gguf = TinyLlama().write(tmp_path / "tiny.gguf")
    export(Order(str(gguf), tmp_path / "release", "tiny", Recipe.CUDA_INT8, run=False))
    code, said = refused(
        tmp_path / "release",
        {"EDGE__ENGINE__DEVICE": "cuda", "EDGE__LOG__LEVEL": "error"} | {"EDGE__ENGINE__CONTEXT_TOKENS": "48"},
    )
    assert code == 1
    assert "asks for the device 'cuda'" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_an_engine_whose_node_is_gone_already_does_not_stay() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", "edge_node.runtime.worker", "--fd", str(theirs.fileno()), "--parent", "1"]
        result = subprocess.run(command, cwd=ROOT, pass_fds=[theirs.fileno()], capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, b"")
