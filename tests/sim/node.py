"""A node as routers see one: frames, slots and a line, an engine that steps, crashes, hangs and comes back.

Fences by the real switchboard. What it says is `tests/sim/speech`'s. Where it imitates `edge_node`: a Progress of
nothing at once when it has queued a stream, Started and Progress while it reads, one Tokens frame a link and step,
given ids replayed silently (also when they end the answer already), Status four times a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

from core.errors import DeadlineExceeded
from core.frames import (
    PROTOCOL,
    SPEECH_VERSION,
    Cancel,
    Done,
    Drain,
    Failed,
    Finish,
    Generate,
    Hello,
    Progress,
    Rates,
    Row,
    Started,
    Status,
    Timings,
    Usage,
)
from edge_node.runtime.pipe import Outputs
from edge_node.switchboard import LinkId, StreamFrame, Switchboard
from tests.sim.network import Connection
from tests.sim.speech import Prompt, Speaker, fitted, read
from tests.sim.world import Process, World

STATUS_S = 0.25
VOUCHED_S = 1.0
CHUNK = 64
RELEASE = "tiny@0123456789ab"
POISON = "poison@"
"""In an item's text, with a number behind it: an engine that comes to that position of the answer dies."""


@dataclass(frozen=True, slots=True)
class Build:
    """What a node is. hang_s: how long a hanging engine lives. drain_s: how long its streams get to go elsewhere."""

    name: str
    variant: str
    context_tokens: int
    slots: int
    max_waiting: int
    step_s: float
    load_s: float = 0.8
    hang_s: float = 2.5
    drain_s: float = 3.0


@dataclass(eq=False, slots=True)
class Answer:
    """A stream in the engine. computed: prompt tokens that were read."""

    request: Generate
    prompt: Prompt
    dropped_items: int
    speaker: Speaker
    most: int
    due_s: float
    poison_at: int
    computed: int = 0
    announced: bool = False

    @property
    def ended(self) -> bool:
        return self.speaker.ended or self.speaker.count >= self.most


@dataclass(eq=False)
class Engine:
    """pid 0 = there is none. hangs_since_s: of an engine that hangs."""

    pid: int = 0
    ready: bool = False
    hangs_since_s: float | None = None
    stepping: bool = False
    streams: dict[str, Answer] = field(default_factory=dict)
    running: list[Answer] = field(default_factory=list)
    waiting: list[Answer] = field(default_factory=list)

    def forget(self, answer: Answer) -> None:
        self.streams.pop(answer.request.stream, None)
        for line in (self.running, self.waiting):
            if answer in line:
                line.remove(answer)


class Node:
    """Invariant: a stream is in the switchboard only while an engine lives that has it."""

    def __init__(self, world: World, build: Build) -> None:
        self.world = world
        self.build = build
        self.process = Process(world, build.name)
        self.url = f"ws://{build.name}/link"
        self.draining = False
        self.deaths: dict[str, int] = {}
        self.refusals: dict[str, float] = {}
        self.switchboard = Switchboard()
        self.engine = Engine()
        self._links: dict[LinkId, Connection] = {}
        self._number = 0
        self._pids = 100

    @property
    def idle(self) -> bool:
        return not (len(self.switchboard) or self.engine.streams or self.engine.running or self.engine.waiting)

    # -- the process ---------------------------------------------------------------------------

    def boot(self) -> None:
        """Begin a new life; nothing happens to one that lives."""
        if self.process.alive:
            return
        self.process.begin_life()
        self.world.trace(self.build.name, "starts")
        self.draining = False
        self.switchboard, self._links = Switchboard(), {}
        self._load()
        self.process.every(STATUS_S, self._tell)

    def kill(self) -> None:
        if not self.process.alive:
            return
        self.world.note("node kills")
        self.world.trace(self.build.name, f"is killed with {len(self.switchboard)} streams")
        self._vanish()

    def drain(self) -> None:
        """Stop in order: streams go elsewhere, or fail retryably after `drain_s`."""
        if not self.process.works or self.draining:
            return
        self.world.note("drains")
        self.world.trace(self.build.name, f"drains {len(self.switchboard)} streams")
        self.draining = True
        self._tell()
        for connection in self._links.values():
            connection.to_router(Drain(self.build.drain_s))
        self._leave_when_empty(self.world.now + self.build.drain_s)

    def _leave_when_empty(self, latest_s: float) -> None:
        if len(self.switchboard) and self.world.now < latest_s:
            self.process.later(0.02, self._leave_when_empty, latest_s)
            return
        self._fail_all("draining", "The node shut down before the answer was complete; send the request again.")
        # What was said last still arrives; then the links end in order.
        self.process.later(0.2, self._vanish)

    def _vanish(self) -> None:
        links, self._links = list(self._links.values()), {}
        self.process.end_life()
        self.engine, self.switchboard = Engine(), Switchboard()
        for connection in links:
            connection.forget_node()

    # -- the engine ----------------------------------------------------------------------------

    def crash_engine(self, why: str = "engine_lost") -> None:
        """The engine's process dies; the node tells its routers and starts another."""
        if not self.process.alive or not self.engine.pid:
            return
        self.world.note("engine deaths" if why == "engine_lost" else "hung engines killed")
        self.world.trace(self.build.name, f"loses its engine ({why}) with {len(self.engine.streams)} streams")
        self.engine = Engine()
        self._fail_all(why, "The engine stopped while it was answering; send the request again.")
        self._tell()
        self.process.later(0.5, self._load)

    def hang_engine(self) -> None:
        """The engine does nothing any more; some time after it is not vouched for, it is killed."""
        if self.process.works and self.engine.pid and self.engine.hangs_since_s is None:
            self.world.note("hangs")
            self.world.trace(self.build.name, "has an engine that hangs")
            self.engine.hangs_since_s = self.world.now
            self.process.later(VOUCHED_S + self.build.hang_s, self._kill_hung, self.engine)

    def recover_engine(self) -> None:
        """It was only slow."""
        if self.process.alive and self.engine.hangs_since_s is not None:
            self.engine.hangs_since_s = None
            self._wake()

    def _kill_hung(self, engine: Engine) -> None:
        if engine is self.engine and engine.hangs_since_s is not None:
            self.crash_engine("engine_stalled")

    def _load(self) -> None:
        self._pids += 1
        self.engine = Engine(self._pids)
        self.process.later(self.build.load_s, self._loaded, self.engine)

    def _loaded(self, engine: Engine) -> None:
        if engine is self.engine:
            engine.ready = True
            self._tell()

    def _fail_all(self, code: str, message: str) -> None:
        failed = self.switchboard.fail_all(code, message)
        if code == "engine_lost":
            for frame in chain.from_iterable(failed.values()):
                assert isinstance(frame, Failed)
                self.deaths[frame.stream] = self.deaths.get(frame.stream, 0) + 1
        self._send(failed)

    # -- what routers ask ----------------------------------------------------------------------

    def hello(self) -> Hello:
        build = self.build
        return Hello(
            PROTOCOL,
            build.name,
            f"{build.name}-{self.process.life}",
            "here",
            releases=[RELEASE],
            variants=[build.variant],
            context_tokens=build.context_tokens,
            slots=build.slots,
            speech_version=SPEECH_VERSION,
        )

    def on_link_up(self, connection: Connection) -> None:
        self._number += 1
        self._links[LinkId(self._number)] = connection
        connection.number = self._number
        connection.to_router(self._status())

    def on_link_lost(self, connection: Connection) -> None:
        if self._links.pop(LinkId(connection.number), None) is not None:
            for cancel in self.switchboard.drop_link(LinkId(connection.number)):
                self._cancel(cancel)

    def on_frame(self, connection: Connection, frame: Generate | Cancel) -> None:
        link = LinkId(connection.number)
        if isinstance(frame, Cancel):
            for cancel in self.switchboard.cancel(link, frame):
                self._cancel(cancel)
        elif self.draining and frame.epoch == 1:
            self._refuse(connection, frame, "draining")
        elif not self.engine.ready:
            self._refuse(connection, frame, "overloaded")
        else:
            self._send(self.switchboard.contest(link, frame))
            if self.switchboard.admit(link, frame):
                self._submit(frame)

    def _refuse(self, connection: Connection, request: Generate, code: str) -> None:
        self._note_refusal(request.stream)
        connection.to_router(Failed(request.stream, request.epoch, code, True, f"The node is {code}; try another."))

    def _note_refusal(self, stream: str) -> None:
        self.world.note("refusals")
        self.refusals[stream] = self.world.now

    def _submit(self, request: Generate) -> None:
        engine, names = self.engine, (request.stream, request.epoch)
        if (known := engine.streams.get(request.stream)) is not None:
            engine.forget(known)
        answer = self._answer(request)
        if answer is None:
            self._route(after=[Failed(*names, "context_length_exceeded", False, "The conversation is too long.")])
        elif answer.ended:
            self._route(before=[self._started(answer)], after=[self._done(answer)])
        elif len(engine.running) >= self.build.slots and len(engine.waiting) >= self.build.max_waiting:
            self._note_refusal(request.stream)
            self._route(after=[Failed(*names, "overloaded", True, "The line is full; try again shortly.")])
        else:
            engine.streams[request.stream] = answer
            engine.waiting.append(answer)
            self._route(before=[Progress(*names, 0, answer.prompt.tokens)])
            self._wake()

    def _answer(self, request: Generate) -> Answer | None:
        """None: the conversation is too long."""
        most = self.build.context_tokens
        cuts = request.truncation == "auto" and not request.output_ids
        dropped = fitted(request.items, most, request.max_output_tokens, cuts, request.dropped_items)
        if dropped is None:
            return None
        prompt = read(request.items, dropped)
        speaker = Speaker(prompt, request.seed)
        for token in request.output_ids:
            speaker.hear(token)
        _, poisoned, position = request.items[-1].text.partition(POISON)
        return Answer(
            request,
            prompt,
            dropped,
            speaker,
            min(request.max_output_tokens, most - prompt.tokens),
            self.world.now + request.deadline_s if request.deadline_s else float("inf"),
            int(position.split()[0]) if poisoned else -1,
        )

    def _cancel(self, cancel: Cancel) -> None:
        answer = self.engine.streams.get(cancel.stream)
        if answer is not None and cancel.epoch >= answer.request.epoch:
            self.engine.forget(answer)
            self._route(after=[self._done(answer, cancelled=True)])

    # -- steps ---------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self.engine.stepping:
            self.engine.stepping = True
            self.process.later(self.build.step_s, self._step, self.engine)

    def _step(self, engine: Engine) -> None:
        if engine is not self.engine:
            return
        engine.stepping = False
        if engine.hangs_since_s is not None:
            return
        before: list[Started | Progress] = []
        rows: list[Row] = []
        after: list[Done | Failed] = []
        for answer in [one for one in engine.streams.values() if one.due_s <= self.world.now]:
            engine.forget(answer)
            error = DeadlineExceeded(answer.request.deadline_s)
            after.append(Failed(answer.request.stream, answer.request.epoch, error.code, False, error.message))
        while engine.waiting and len(engine.running) < self.build.slots:
            engine.running.append(engine.waiting.pop(0))
        for answer in list(engine.running):
            if answer.speaker.count >= answer.poison_at >= 0:
                self.world.note("poison")
                self.crash_engine()
                return
            self._advance(answer, before, rows)
            if answer.ended:
                engine.forget(answer)
                after.append(self._done(answer))
        self._route(before, rows, after)
        if engine.running or engine.waiting:
            self._wake()

    def _advance(self, answer: Answer, before: list[Started | Progress], rows: list[Row]) -> None:
        request = answer.request
        if not answer.announced:
            answer.announced = True
            before.append(self._started(answer))
        if answer.computed < answer.prompt.tokens:
            answer.computed = min(answer.prompt.tokens, answer.computed + CHUNK)
            before.append(Progress(request.stream, request.epoch, answer.computed, answer.prompt.tokens))
            if answer.computed < answer.prompt.tokens:
                return
        speaker, position = answer.speaker, answer.speaker.count
        ids = [speaker.next_id()]
        deltas = [speaker.hear(ids[0])]
        # As after a drafted id that was right: several in one row.
        if speaker.state % 5 == 0 and not answer.ended:
            ids.append(speaker.next_id())
            deltas.append(speaker.hear(ids[1]))
        rows.append(Row(request.stream, request.epoch, position, ids, deltas))

    def _started(self, answer: Answer) -> Started:
        request = answer.request
        return Started(request.stream, request.epoch, answer.prompt.tokens, 0, answer.dropped_items)

    def _done(self, answer: Answer, cancelled: bool = False) -> Done:
        request, speaker = answer.request, answer.speaker
        usage = Usage(answer.prompt.tokens, answer.computed % 7, speaker.count, speaker.reasoning)
        finish: Finish = "cancelled" if cancelled else "stop" if speaker.ended else "length"
        return Done(request.stream, request.epoch, finish, usage, Timings())

    def _route(
        self,
        before: list[Started | Progress] | None = None,
        rows: list[Row] | None = None,
        after: list[Done | Failed] | None = None,
    ) -> None:
        self._send(self.switchboard.route(Outputs(before or [], rows or [], after or [])))

    def _send(self, routed: dict[LinkId, list[StreamFrame]]) -> None:
        for link, frames in routed.items():
            if (connection := self._links.get(link)) is not None:
                for frame in frames:
                    connection.to_router(frame)

    # -- what it says of itself ----------------------------------------------------------------

    def _tell(self) -> None:
        status = self._status()
        for connection in self._links.values():
            connection.to_router(status)

    def _status(self) -> Status:
        engine = self.engine
        hung_s = 0.0 if engine.hangs_since_s is None else self.world.now - engine.hangs_since_s
        return Status(
            load=len(engine.streams) / self.build.slots,
            running=len(engine.running),
            waiting=len(engine.waiting),
            rates=Rates(),
            chains=[],
            vouched=engine.ready and hung_s < VOUCHED_S,
            draining=self.draining,
            state="ready" if engine.ready else "loading",
            engine_pid=engine.pid,
        )
