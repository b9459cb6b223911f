"""The engine process's loop, with a real engine and pipe and a runner that stops where the test wants it."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from core.frames import Cancel, Done, Failed, Generate
from edge_node.engine.engine import Engine, EngineLimits
from edge_node.engine.step import StepPlan, StepResult
from edge_node.runtime import pipe
from edge_node.runtime.pipe import Beat, Outputs, Residents, ToChild
from edge_node.runtime.worker import HungUp, Pipe, Stepper
from tests.e2e.waiting import eventually
from tests.fakes import FakeRunner, FakeSpeech, fake_manifest, generate

PATIENCE_S = 30.0


class GatedRunner(FakeRunner):
    """Runs a step only while its gate is open."""

    def __init__(self, slots: int, context_tokens: int, blocks: int) -> None:
        super().__init__(slots, context_tokens, blocks)
        self.gate = threading.Event()
        self.gate.set()

    def run(self, plan: StepPlan) -> StepResult:
        assert self.gate.wait(PATIENCE_S)
        return super().run(plan)


class Bench:
    """A stepper in a thread, and the node's end of its pipe. resident: what it was told of the prefix store."""

    def __init__(self, node: socket.socket, child: socket.socket) -> None:
        node.settimeout(PATIENCE_S)
        self.resident: dict[str, int] = {}
        self.runner = GatedRunner(2, 256, 4)
        self.inbox: queue.Queue[ToChild] = queue.Queue()
        limits = EngineLimits(slots=2, context_tokens=256, max_waiting=4, prefix_blocks=4)
        engine = Engine(fake_manifest(), FakeSpeech(), limits)
        self.stepper = Stepper(engine, self.runner, Pipe(child), self.inbox)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self._node = node.makefile("rb")

    def _run(self) -> None:
        with contextlib.suppress(HungUp):  # the test is over, and its pipe closed
            self.stepper.run_forever()

    def tell(self, *messages: Generate | Cancel) -> None:
        for message in messages:
            self.inbox.put(message)

    def hear(self) -> Outputs:
        while not isinstance(message := self._next(), Outputs):
            pass
        return message

    def hear_of(self, key: str) -> None:
        """Listen until it is said how much of `key` is resident."""
        while key not in self.resident:
            self._next()

    def _next(self) -> Outputs | Residents:
        length = pipe.body_bytes(self._node.read(pipe.HEADER_BYTES))
        message = pipe.decode_to_parent(self._node.read(length))
        assert isinstance(message, Outputs | Residents)
        if isinstance(message, Residents):
            self.resident.update(message.chains)
        return message

    def beat(self) -> Beat:
        return self.stepper.pulse.beat(time.monotonic())

    def end_of(self, *streams: str) -> dict[str, str]:
        """How the streams finish; hears until all of them have."""
        ends: dict[str, str] = {}
        while len(ends) < len(streams):
            for frame in self.hear().after:
                assert isinstance(frame, Done)
                ends[frame.stream] = frame.finish
        assert set(ends) == set(streams)
        return ends


@pytest.fixture
def bench() -> Iterator[Bench]:
    node, child = socket.socketpair()
    with node, child:
        yield Bench(node, child)


def test_streams_run_to_their_ends_and_the_engine_rests(bench: Bench) -> None:
    bench.tell(generate("a", most=3), generate("b", most=5), generate("c", most=2))
    bench.end_of("a", "b", "c")
    eventually(lambda: bench.beat().age_s < 0)
    beat = bench.beat()
    assert (beat.running, beat.waiting) == (0, 0)
    assert beat.step > 0


def test_a_beat_tells_of_a_step_that_does_not_end(bench: Bench) -> None:
    bench.runner.gate.clear()
    bench.tell(generate("a", most=2))
    eventually(lambda: bench.beat().step == 1 and bench.beat().age_s > 0)
    first = bench.beat()
    assert first.predicted_s >= 0.0
    eventually(lambda: bench.beat().age_s > first.age_s + 0.01)
    assert bench.beat().step == 1
    bench.runner.gate.set()
    bench.end_of("a")
    eventually(lambda: bench.beat().age_s < 0)


def test_what_comes_during_a_step_is_taken_before_the_next(bench: Bench) -> None:
    bench.runner.gate.clear()
    bench.tell(generate("a", most=16))
    eventually(lambda: bench.beat().step == 1)
    bench.tell(Cancel("a", 1), generate("b", most=2))
    bench.runner.gate.set()
    assert bench.end_of("a", "b")["a"] == "cancelled"


def test_a_cancelled_stream_leaves_an_idle_engine(bench: Bench) -> None:
    bench.runner.gate.clear()
    bench.tell(generate("a", most=16))
    eventually(lambda: bench.beat().step == 1)
    bench.tell(Cancel("a", 1))
    bench.runner.gate.set()
    assert bench.end_of("a") == {"a": "cancelled"}
    eventually(lambda: bench.beat().age_s < 0 and bench.beat().running == 0)


def test_requests_that_take_long_to_accept_do_not_hold_up_who_is_being_answered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_node.runtime.worker.TAKE_S", 0.0)
    bench.runner.gate.clear()
    bench.tell(generate("a", most=16))
    eventually(lambda: bench.beat().step == 1)
    bench.tell(*[generate(stream, "!") for stream in "bcde"])
    bench.runner.gate.set()
    accepted_after: list[int] = []
    steps = 0
    while len(accepted_after) < 4:
        heard = bench.hear()
        steps += bool(heard.rows)
        accepted_after += [steps for frame in heard.after if frame.stream != "a"]
    assert len(set(accepted_after)) == 4, "each is looked at after another step"
    assert bench.end_of("a")["a"] in {"stop", "length"}
    eventually(lambda: bench.beat().age_s < 0)


def test_what_has_passed_its_deadline_ends_before_the_next_step(bench: Bench) -> None:
    bench.runner.gate.clear()
    bench.tell(generate("a", most=16, deadline_s=0.01))
    eventually(lambda: bench.beat().step == 1 and bench.beat().age_s > 0.01)
    bench.runner.gate.set()
    ends: list[Done | Failed] = []
    while not ends:
        ends += bench.hear().after
    assert [(end.stream, isinstance(end, Failed)) for end in ends] == [("a", True)]
    eventually(lambda: bench.beat().age_s < 0 and bench.beat().running == 0)


def conversation(stream: str) -> Generate:
    """130 ids, of which two whole blocks are kept."""
    request = generate(stream, "a" * 130, most=4)
    return msgspec.structs.replace(request, prefix_keys=["key"])


def test_what_becomes_resident_is_told_while_the_engine_is_busy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_node.runtime.worker.RESIDENTS_S", 0.0)
    bench.tell(conversation("a"))
    bench.end_of("a")
    assert bench.resident["key"] == 128


def test_what_became_resident_is_told_at_the_latest_when_the_engine_rests(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_node.runtime.worker.RESIDENTS_S", float("inf"))
    bench.tell(conversation("a"))
    bench.end_of("a")
    assert bench.resident == {}
    bench.hear_of("key")
    assert bench.resident["key"] == 128
