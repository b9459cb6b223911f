"""The engine process's loop, with a real engine and pipe and a runner that stops where the test wants it."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, NoReturn

import msgspec
import pytest

from core.conversation import Item
from core.frames import Cancel, Done, Failed, Generate
from edge_node.engine.engine import Engine, EngineLimits, Prepared
from edge_node.engine.speech import PLAIN, Rendered, Setting
from edge_node.engine.step import StepPlan, StepResult
from edge_node.runtime import pipe, worker
from edge_node.runtime.pipe import Beat, Fatal, Load, Outputs, Residents
from edge_node.runtime.worker import HungUp, Listener, Pipe, Stepper
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


class Panic(BaseException):
    """What a panic in a native library becomes: no Exception."""


class GatedSpeech(FakeSpeech):
    """Notes which texts it lays out, last items first; a text with '?' waits for its gate, one with '#' panics.

    Re-reading lays out a conversation with an empty last item.
    """

    def __init__(self) -> None:
        self.laid_out: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()

    def lay_out(self, items: list[Item], release: str, setting: Setting = PLAIN) -> Rendered:
        text = items[-1].text
        self.laid_out.append(text)
        if "#" in text:
            raise Panic(f"index out of bounds in {text!r}")
        if not self.gate.is_set() and ("?" in text or not text):
            self.waiting.set()
            assert self.gate.wait(PATIENCE_S)
        return super().lay_out(items, release, setting)


def small_engine(speech: FakeSpeech) -> Engine:
    limits = EngineLimits(slots=2, context_tokens=256, max_waiting=4, chunk_tokens=64, prefix_blocks=4)
    return Engine(fake_manifest(), speech, limits)


class Bench:
    """A listener and a stepper in a thread each, and the node's end of their pipe.

    resident: what the node was told of the prefix store.
    """

    def __init__(self, node: socket.socket, child: socket.socket) -> None:
        node.settimeout(PATIENCE_S)
        self.resident: dict[str, int] = {}
        self.runner = GatedRunner(2, 256, 4)
        self.inbox: worker.Inbox = queue.Queue()
        self.speech = GatedSpeech()
        engine = small_engine(self.speech)
        self.stepper = Stepper(engine, self.runner, Pipe(child), self.inbox)
        listener = Listener(Pipe(child), self.inbox)
        listener.engine = engine
        for run in (self.stepper.run_forever, listener.run_forever):
            threading.Thread(target=_until_closed, args=(run,), daemon=True).start()
        self._socket = node
        self._node = node.makefile("rb")

    def tell(self, *messages: Generate | Cancel) -> None:
        """Straight into the inbox, as what the listener did not think worth preparing."""
        for message in messages:
            self.inbox.put(message)

    def send(self, *messages: Generate | Cancel) -> None:
        """Past the listener."""
        for message in messages:
            self._socket.sendall(pipe.encode(message))

    def hear(self) -> Outputs:
        while not isinstance(message := self._next(), Outputs):
            pass
        return message

    def hear_of(self, key: str) -> None:
        """Listen until it is said how much of `key` is resident."""
        while key not in self.resident:
            self._next()

    def _next(self) -> Outputs | Residents:
        message = heard(self._node)
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


def heard(node: BinaryIO) -> pipe.ToParent:
    """The next message at the node's end."""
    length = pipe.body_bytes(node.read(pipe.HEADER_BYTES))
    return pipe.decode_to_parent(node.read(length))


def _until_closed(run: Callable[[], None]) -> None:
    with contextlib.suppress(HungUp, OSError):  # the test is over, and its pipe closed
        run()


@pytest.fixture
def bench() -> Iterator[Bench]:
    node, child = socket.socketpair()
    with node, child:
        yield Bench(node, child)
        node.shutdown(socket.SHUT_RDWR)


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


def test_of_a_long_prompt_whose_answer_is_cancelled_only_the_step_under_way_is_read(bench: Bench) -> None:
    bench.runner.gate.clear()
    bench.send(generate("a", "x" * 200, most=16))
    eventually(lambda: bench.beat().step == 1)
    bench.send(Cancel("a", 1))
    eventually(lambda: bench.inbox.qsize() == 1)
    bench.runner.gate.set()
    assert bench.end_of("a") == {"a": "cancelled"}
    eventually(lambda: bench.beat().age_s < 0)
    (only,) = bench.runner.plans
    assert only.chunk is not None and len(only.chunk.ids) == 64


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


def test_who_is_being_answered_is_answered_on_while_a_long_prompt_is_prepared(bench: Bench) -> None:
    bench.runner.gate.clear()
    bench.speech.gate.clear()
    bench.send(generate("a", most=16))
    eventually(lambda: bench.beat().step == 1)
    bench.send(generate("b", "as long as that?", most=2))
    assert bench.speech.waiting.wait(PATIENCE_S)
    bench.runner.gate.set()
    assert bench.end_of("a")["a"] in {"stop", "length"}
    bench.speech.gate.set()
    bench.end_of("b")


def test_a_cancel_does_not_overtake_its_request(bench: Bench) -> None:
    bench.runner.gate.clear()
    bench.speech.gate.clear()
    bench.send(generate("a", most=2))
    eventually(lambda: bench.beat().step == 1)
    bench.send(generate("b", "long?", most=16), Cancel("b", 1))
    assert bench.speech.waiting.wait(PATIENCE_S)
    assert bench.inbox.empty()
    bench.speech.gate.set()
    eventually(lambda: bench.inbox.qsize() == 2)
    bench.runner.gate.set()
    assert bench.end_of("a", "b")["b"] == "cancelled"


def test_what_comes_while_a_conversation_is_rendered_again_is_taken_before_the_next_one(bench: Bench) -> None:
    bench.speech.gate.clear()
    bench.runner.gate.clear()
    bench.tell(generate("a", "first", most=2))
    eventually(lambda: bench.beat().step == 1)
    bench.tell(generate("b", "second", most=2))
    bench.runner.gate.set()
    bench.end_of("a", "b")
    assert bench.speech.waiting.wait(PATIENCE_S)
    bench.tell(generate("c", "third", most=2))
    bench.speech.gate.set()
    bench.end_of("c")
    eventually(lambda: bench.beat().age_s < 0)
    assert bench.speech.laid_out == ["first", "second", "", "third", "", ""]


def test_a_panic_while_a_request_is_prepared_ends_that_request(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.runner.gate.clear()
    bench.send(generate("a", most=3))
    eventually(lambda: bench.beat().step == 1)
    bench.send(generate("b", "#secret"), generate("c", most=2))
    eventually(lambda: bench.inbox.qsize() == 2)
    bench.runner.gate.set()
    ends = list[Done | Failed]()
    while len(ends) < 3:
        ends += bench.hear().after
    assert {end.stream for end in ends if isinstance(end, Failed)} == {"b"}
    (fault,) = [record.message for record in caplog.records if "stream_fault" in record.message]
    assert "stream=b epoch=1 error=Panic" in fault
    assert "secret" not in fault


def test_a_newer_epoch_that_cannot_be_prepared_replaces_the_older_one(bench: Bench) -> None:
    bench.runner.gate.clear()
    bench.send(generate("a", most=16))
    eventually(lambda: bench.beat().step == 1)
    bench.send(generate("a", "#", epoch=2))
    eventually(lambda: bench.inbox.qsize() == 1)
    bench.runner.gate.set()
    ends: list[Done | Failed] = []
    while not ends:
        ends += bench.hear().after
    assert [(end.epoch, isinstance(end, Failed)) for end in ends] == [(2, True)]
    eventually(lambda: bench.beat().age_s < 0 and bench.beat().running == 0)


def passed_on(engine: Engine | None, *messages: Generate | Cancel) -> list[object]:
    """What a listener makes of messages, after which the node hangs up."""
    inbox: worker.Inbox = queue.Queue()
    node, child = socket.socketpair()
    with node, child:
        listener = Listener(Pipe(child), inbox)
        listener.engine = engine
        node.sendall(b"".join(map(pipe.encode, messages)))
        node.close()
        listener.run_forever()
    return [inbox.get_nowait() for _ in messages]


def test_what_a_full_engine_will_refuse_is_not_prepared() -> None:
    speech = GatedSpeech()
    engine = small_engine(speech)
    for number in range(6):
        engine.submit(generate(str(number)), 0.0)
    before = len(speech.laid_out)
    refused, first = generate("refused"), generate("first", priority=1)
    continued = generate("continued", output_ids=[3])
    passed = passed_on(engine, refused, first, continued, Cancel("0", 1))
    assert passed[0] == refused
    assert [one.request for one in passed[1:3] if isinstance(one, Prepared)] == [first, continued]
    assert passed[3] == Cancel("0", 1)
    assert len(speech.laid_out) == before + 2


def test_a_request_that_comes_before_the_engine_is_passed_on() -> None:
    assert passed_on(None, generate("a")) == [generate("a")]


LOAD = Load("", "fake@000000000000", "fake", "cpu", 1, 1, 256, 1, 0.0, 0, False, 0, False, 1.0)


def test_a_panic_of_the_engine_is_told_before_the_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: object) -> None:
        raise Panic

    monkeypatch.setattr(worker, "_serve", panic)
    node, child = socket.socketpair()
    with node, child, node.makefile("rb") as told:
        mine = Pipe(child)
        inbox: worker.Inbox = queue.Queue()
        assert worker._serve_or_say_why(mine, LOAD, Listener(mine, inbox), inbox) == 1
        message = heard(told)
    assert isinstance(message, Fatal)
    assert "Panic" in message.message


class Exited(Exception):
    """In place of the end of the process."""


def test_a_listener_that_dies_ends_the_process_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def panic() -> None:
        raise Panic

    def leave(status: int) -> NoReturn:
        raise Exited(status)

    node, child = socket.socketpair()
    with node, child, node.makefile("rb") as told:
        mine = Pipe(child)
        listener = Listener(mine, queue.Queue())
        monkeypatch.setattr(listener, "run_forever", panic)
        with monkeypatch.context() as patched, pytest.raises(Exited, match="1"):
            patched.setattr("edge_node.runtime.worker.os._exit", leave)
            worker._listen(mine, listener)
        assert isinstance(heard(told), Fatal)
