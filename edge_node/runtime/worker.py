"""The engine process: loads one release, steps the engine, beats. Started by its node as
`python -m edge_node.runtime.worker`, ends when the node does.

    main thread    inbox -> engine.submit/cancel; plan -> run -> commit; outputs -> node
    listener       socket -> engine.prepare -> inbox; ends the process on end of file
    beats          every BEAT_S a Beat, whatever the main thread is doing

The engine belongs to the main thread. The listener calls two methods of it: `prepare`, which renders prompts and
compiles schemas, seconds of work that nobody who is being answered shall wait for, and `full_for`, a hint. It takes
one message after another, so that no Cancel overtakes its Generate; while it prepares, the node's other messages
wait in the socket, and so does the end of file (the kernel ends this process with its node all the same).
An error of one request ends its stream; one that escapes, from whichever thread, ends the process with a Fatal.

Does not know routers, Consul or HTTP.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from core.errors import EdgechatError, FrameError, ReleaseError
from core.frames import Cancel, Failed, Generate, Rates
from edge_node.logs import setup_logging
from edge_node.release.model_store import Release, open_release, verify
from edge_node.release.servable import check_servable
from edge_node.runtime.pipe import (
    HEADER_BYTES,
    Beat,
    Fatal,
    Load,
    Loaded,
    Residents,
    ToChild,
    ToParent,
    body_bytes,
    decode_to_child,
    encode,
    outputs,
)

if TYPE_CHECKING:
    from edge_node.engine.engine import Engine, Output, Prepared
    from edge_node.engine.step import StepRunner

    Inbox: TypeAlias = queue.Queue[Load | Generate | Prepared | Failed | Cancel]
    """What the listener hands to the main thread. Generate: not worth preparing. Failed: preparing it ended so."""

log = logging.getLogger("edge_node.worker")

BEAT_S = 0.2
# Messages that may wait to be looked at; past it the listener, and so the node's pipe, waits.
INBOX_MESSAGES = 1024
# How long messages may be looked at between two steps.
TAKE_S = 0.05
# How long changes of the prefix store may wait while the engine is busy; the node sends a Status no oftener.
RESIDENTS_S = 0.25
_PR_SET_PDEATHSIG = 1


class HungUp(Exception):
    """The node has closed its end: nobody is left to work for."""


class Pipe:
    """The child's end of the socketpair, for sending from several threads."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._lock = threading.Lock()

    def send(self, message: ToParent) -> None:
        """Waits until the node has taken it; raises HungUp."""
        data = encode(message)
        try:
            with self._lock:
                self._socket.sendall(data)
        except OSError as error:
            raise HungUp from error

    def receive(self) -> ToChild | None:
        """The node's next message; None at end of file. Raises FrameError."""
        header = self._exactly(HEADER_BYTES)
        body = None if header is None else self._exactly(body_bytes(header))
        return None if body is None else decode_to_child(body)

    def _exactly(self, count: int) -> bytes | None:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            received = self._socket.recv_into(view)
            if received == 0:
                return None
            view = view[received:]
        return bytes(data)


@dataclass(frozen=True, slots=True)
class Pulse:
    """What the main thread is at; replaced as a whole, so that the beating thread needs no lock.

    started_s: None while it waits for work.
    """

    step: int = 0
    started_s: float | None = None
    predicted_s: float = 0.0
    running: int = 0
    waiting: int = 0
    rates: Rates = field(default_factory=Rates)
    yielding: int = 0

    def beat(self, now_s: float) -> Beat:
        age_s = -1.0 if self.started_s is None else now_s - self.started_s
        return Beat(self.step, age_s, self.predicted_s, self.running, self.waiting, self.rates, self.yielding)


class Listener:
    """Hands the node's messages on, requests prepared, in one thread. engine: None while it loads."""

    def __init__(self, pipe: Pipe, inbox: Inbox) -> None:
        self.engine: Engine | None = None
        self._pipe = pipe
        self._inbox = inbox

    def run_forever(self) -> None:
        """Until the node hangs up, or an OSError or FrameError."""
        while (message := self._pipe.receive()) is not None:
            self._inbox.put(self._prepared(message) if isinstance(message, Generate) else message)

    def _prepared(self, request: Generate) -> Generate | Prepared | Failed:
        """A request that will be refused unread is passed on as it is; so is one that comes before its time."""
        engine = self.engine
        try:
            # One that continues an answer may be accepted by a full engine: its ids may end it already.
            if engine is None or (engine.full_for(request.priority) and not request.output_ids):
                return request
            return engine.prepare(request, time.monotonic())
        except BaseException as error:  # a panic of a native library is no Exception
            _log_fault(request.stream, request.epoch, error)
            sentence = "This request failed inside the node before it was answered; the log names the cause."
            return Failed(request.stream, request.epoch, "server_error", False, sentence)


class Stepper:
    """Feeds the engine and runs its plans, one after another, in one thread."""

    def __init__(self, engine: Engine, runner: StepRunner, pipe: Pipe, inbox: Inbox) -> None:
        self.pulse = Pulse()
        self._engine = engine
        self._runner = runner
        self._pipe = pipe
        self._inbox = inbox
        self._steps = 0
        self._told_residents_s = 0.0

    def run_forever(self) -> None:
        while True:
            self._wait_for_work()
            while self._step():
                self._take_waiting()

    def _wait_for_work(self) -> None:
        """The engine has nothing to do: block until a message comes."""
        self._engine.check_invariants()
        self._tell_residents(time.monotonic())
        self._publish(None)
        self._take(self._inbox.get())
        self._take_waiting()

    def _take_waiting(self) -> None:
        """Not all at once: those who are being answered would wait for a long inbox."""
        until_s = time.monotonic() + TAKE_S
        for _ in range(self._inbox.qsize()):
            self._take(self._inbox.get_nowait())
            if time.monotonic() >= until_s:
                return

    def _take(self, message: Load | Generate | Prepared | Failed | Cancel) -> None:
        now_s = time.monotonic()
        self._publish(now_s)
        match message:
            case Cancel():
                self._give(self._engine.cancel(message.stream, message.epoch, now_s))
            case Failed():
                # An older epoch of the stream is replaced, as it would have been by the request.
                self._engine.cancel(message.stream, message.epoch, now_s)
                self._give([message])
            case Load():
                raise FrameError("The node sent Load twice.")
            case _:
                self._give(self._engine.submit(message, now_s))

    def _step(self) -> bool:
        """Plan, run and commit one step, if there is one; False when nothing is left to do until a message comes."""
        now_s = time.monotonic()
        self._give(self._engine.expire(now_s))
        self._publish(now_s)  # planning may render a past conversation
        plan = self._engine.plan(now_s)
        self._log_faults()
        if plan is None:
            return not self._engine.resting
        self._steps += 1
        self._publish(now_s, plan.predicted_s)
        result = self._runner.run(plan)
        done_s = time.monotonic()
        self._give(self._engine.commit(plan, result, done_s))
        if done_s >= self._told_residents_s + RESIDENTS_S:
            self._tell_residents(done_s)
        return True

    def _tell_residents(self, now_s: float) -> None:
        self._told_residents_s = now_s
        if chains := self._engine.take_chains():
            self._pipe.send(Residents(chains))

    def _publish(self, started_s: float | None, predicted_s: float = 0.0) -> None:
        engine = self._engine
        counts = engine.running, engine.waiting, engine.rates, engine.yielding
        self.pulse = Pulse(self._steps, started_s, predicted_s, *counts)

    def _give(self, given: list[Output]) -> None:
        if given:
            self._pipe.send(outputs(given))
        self._log_faults()

    def _log_faults(self) -> None:
        for fault in self._engine.take_faults():
            _log_fault(fault.stream, fault.epoch, fault.error)


def _log_fault(stream: str, epoch: int, error: BaseException) -> None:
    """The type and the place only: a message may quote what a person wrote."""
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("stream_fault stream=%s epoch=%d error=%s where=%r", stream, epoch, type(error).__name__, where)


def main() -> int:
    arguments = _arguments()
    _die_with(arguments.parent)
    setup_logging(arguments.log_level)
    pipe = Pipe(socket.socket(fileno=arguments.fd))
    load = pipe.receive()
    if not isinstance(load, Load):
        return 0
    inbox: Inbox = queue.Queue(INBOX_MESSAGES)
    listener = Listener(pipe, inbox)
    threading.Thread(target=_listen, args=(pipe, listener), name="listener", daemon=True).start()
    try:
        return _serve_or_say_why(pipe, load, listener, inbox)
    except HungUp:
        return 0


def _serve_or_say_why(pipe: Pipe, load: Load, listener: Listener, inbox: Inbox) -> int:
    try:
        _serve(pipe, load, listener, inbox)
    except HungUp:
        raise
    except EdgechatError as error:
        pipe.send(Fatal(error.code, error.message))
    except ImportError as error:
        extra = "edge-cuda" if load.device == "cuda" else "edge-cpu"
        message = f"The engine needs the Python package {error.name!r}; install edgechat[{extra}]."
        pipe.send(Fatal("config_invalid", message))
    except BaseException as error:  # a panic of a native library is no Exception
        pipe.send(_crashed(error))
    return 1


def _crashed(error: BaseException) -> Fatal:
    """What the node is told; the log gets the rest."""
    log.critical("engine_crashed", exc_info=error)
    sentence = f"The engine failed unexpectedly ({type(error).__name__}); please report it with the node's log."
    return Fatal("server_error", sentence)


def _serve(pipe: Pipe, load: Load, listener: Listener, inbox: Inbox) -> None:
    started_s = time.monotonic()
    release = _open_release(load)
    engine, runner = _open_engine(load, release)
    stepper = Stepper(engine, runner, pipe, inbox)
    listener.engine = engine
    pipe.send(Loaded(time.monotonic() - started_s))
    threading.Thread(target=_beat, args=(pipe, stepper), name="beats", daemon=True).start()
    stepper.run_forever()


def _open_release(load: Load) -> Release:
    release = open_release(Path(load.folder))
    found = (release.manifest.release, release.manifest.variant)
    if found != (load.release, load.variant):
        raise ReleaseError(
            f"{load.folder} now holds {found[0]} ({found[1]}), this node serves {load.release} ({load.variant}); "
            "put it back or restart the node."
        )
    if load.verify:
        verify(release)
    return release


def _open_engine(load: Load, release: Release) -> tuple[Engine, StepRunner]:
    # Imported here, so that a missing package is told to the node like every other reason not to serve.
    from edge_node.engine.engine import Engine, EngineLimits
    from edge_node.engine.grammar import Grammars
    from edge_node.engine.speech import open_speech
    from edge_node.runtime.pools import blocks_within
    from edge_node.runtime.runner import Runner

    manifest = release.manifest
    check_servable(manifest, load.device)
    speech = open_speech(manifest, release.read_text)
    grammars = Grammars.open(manifest, release.read_text(manifest.tokenizer), speech.closing_ids)
    prefix_blocks = blocks_within(manifest.kv, load.kv_cache_bytes)
    limits = EngineLimits(
        slots=load.slots,
        context_tokens=load.context_tokens,
        max_waiting=load.max_waiting,
        max_stall_ms=load.max_stall_ms,
        prefix_blocks=prefix_blocks,
        speculation=load.speculation,
        failover_exact_s=load.failover_exact_s,
    )
    engine = Engine(manifest, speech, limits, grammars)
    runner = Runner.open(
        release.folder,
        manifest,
        load.device,
        load.threads,
        load.slots,
        load.context_tokens,
        load.spin_us,
        prefix_blocks,
    )
    for plan, result in runner.warm_up(load.speculation):
        engine.learn(plan, result)
    return engine, runner


def _listen(pipe: Pipe, listener: Listener) -> NoReturn:
    """Runs until the node hangs up; then nobody waits for what the main thread is computing."""
    status = 0
    try:
        listener.run_forever()
    except (OSError, FrameError) as error:
        log.error("pipe_broken error=%r", str(error))
    except BaseException as error:  # without this thread the process would serve nobody, and look well
        status = 1
        with contextlib.suppress(HungUp):
            pipe.send(_crashed(error))
    os._exit(status)


def _beat(pipe: Pipe, stepper: Stepper) -> None:
    with contextlib.suppress(HungUp):
        while True:
            pipe.send(stepper.pulse.beat(time.monotonic()))
            time.sleep(BEAT_S)


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the node dies; leave if that has happened already.

    Not from preexec_fn, which may deadlock in a program with threads; prctl(2): the setting survives no exec.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        log.warning("pdeathsig_failed errno=%d", ctypes.get_errno())
    if os.getppid() != parent:
        os._exit(0)
    # A service manager signals the whole group; the node decides when its engine ends, by hanging up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="edge_node.runtime.worker", description="Started by edge_node, not by hand.")
    parser.add_argument("--fd", type=int, required=True, help="this end of the socketpair")
    parser.add_argument("--parent", type=int, required=True, help="process id of the node")
    parser.add_argument("--log-level", default="info")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
