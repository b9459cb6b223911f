"""Decide what to start, start again and stop.

Events and `now_s` in, effects out: it knows no process, no socket and no clock.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 8.0
STEADY_S = 10.0
"""A process that lived this long is forgiven its earlier deaths."""
GRACE_S = 10.0
"""From being asked to end until being killed."""
PATIENCE_S = 10.0
"""How long a process waits for those it should start after: it can do without them, only less quietly."""
PROGRESS_S = 5.0


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A process, in the life with this number, says that it is ready."""

    name: str
    life: int


@dataclass(frozen=True, slots=True)
class Exited:
    """A process has ended, or could not be started; `how` completes the sentence 'eu ended ...'."""

    name: str
    how: str


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A person, or the system, wants all of it to stop; the second time at once."""


Event = Ticked | Answered | Exited | Interrupted


@dataclass(frozen=True, slots=True)
class Start:
    """Start this process; its lives are counted from 1."""

    name: str
    life: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Ask this process to end."""

    name: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End this process without asking."""

    name: str


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the person one line."""

    text: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """Everything is ready for the first time."""


@dataclass(frozen=True, slots=True)
class Leave:
    """No process is left and none will be started."""


Effect = Start | Stop | Kill | Say | Welcome | Leave


class Phase(enum.Enum):
    """Where a process stands."""

    HELD = "held"  # not started yet: it waits for others
    RUNNING = "running"
    RESTING = "resting"  # it ended and will be started again
    GONE = "gone"  # it ended and will not


@dataclass(slots=True)
class _Process:
    """Invariant: `ready` only while RUNNING; `again_s` means something only while RESTING."""

    name: str
    after: tuple[str, ...]
    phase: Phase = Phase.HELD
    life: int = 0
    started_s: float = 0.0
    again_s: float = 0.0
    backoff_s: float = FIRST_BACKOFF_S
    ready: bool = False
    asked_to_stop: bool = False


class Supervisor:
    """The state of all processes. Invariant: once stopping, nothing is started; Leave is said once, last."""

    def __init__(self, processes: Mapping[str, tuple[str, ...]], now_s: float) -> None:
        """`processes` maps each name to the names it should start after."""
        self._processes = {name: _Process(name, after) for name, after in processes.items()}
        self._began_s = now_s
        self._progress_s = now_s + PROGRESS_S
        self._welcomed = False
        self._stop_asked_s: float | None = None
        self._killed = False
        self._left = False

    def on(self, event: Event, now_s: float) -> list[Effect]:
        """Take one event at `now_s` (monotonic seconds); return what to do, in order."""
        if self._left:
            return []
        match event:
            case Ticked():
                effects: list[Effect] = []
            case Answered():
                effects = self._on_answered(event)
            case Exited():
                effects = self._on_exited(event, now_s)
            case Interrupted():
                effects = self._on_interrupted(now_s)
            case _:
                assert_never(event)
        return effects + (self._start_due(now_s) if self._stop_asked_s is None else self._end_due(now_s))

    def awaited(self) -> dict[str, int]:
        """Return name -> life of the processes that run and have not said yet that they are ready."""
        return {p.name: p.life for p in self._processes.values() if p.phase is Phase.RUNNING and not p.ready}

    def check_invariants(self) -> None:
        """Raise AssertionError if the state contradicts itself."""
        for process in self._processes.values():
            assert process.phase is Phase.RUNNING or not process.ready
            assert FIRST_BACKOFF_S <= process.backoff_s <= MAX_BACKOFF_S
            assert (process.life == 0) == (process.phase is Phase.HELD) or process.phase is Phase.GONE
            assert self._stop_asked_s is None or process.phase in (Phase.RUNNING, Phase.GONE)
        assert not self._left or all(p.phase is Phase.GONE for p in self._processes.values())

    def _on_answered(self, event: Answered) -> list[Effect]:
        process = self._processes[event.name]
        if process.phase is not Phase.RUNNING or process.life != event.life or process.ready:
            return []
        process.ready = True
        if self._stop_asked_s is not None:
            return []
        if self._welcomed:
            return [Say(f"{process.name} is ready again")]
        if all(p.ready for p in self._processes.values()):
            self._welcomed = True
            return [Welcome()]
        return [Say(f"{process.name} is ready")]

    def _on_exited(self, event: Exited, now_s: float) -> list[Effect]:
        process = self._processes[event.name]
        if process.phase is not Phase.RUNNING:
            return []
        process.ready = False
        if self._stop_asked_s is not None:
            process.phase = Phase.GONE
            return []
        lived_s = now_s - process.started_s
        delay_s = FIRST_BACKOFF_S if lived_s >= STEADY_S else process.backoff_s
        process.backoff_s = min(2 * delay_s, MAX_BACKOFF_S)
        process.phase = Phase.RESTING
        process.again_s = now_s + delay_s
        return [Say(f"{event.name} ended {event.how} after {lived_s:.1f} s; starting it again in {delay_s:g} s")]

    def _on_interrupted(self, now_s: float) -> list[Effect]:
        running = [p.name for p in self._processes.values() if p.phase is Phase.RUNNING]
        if self._stop_asked_s is not None:
            return self._kill(running)
        self._stop_asked_s = now_s
        for process in self._processes.values():
            if process.phase is not Phase.RUNNING:
                process.phase = Phase.GONE
        return [Say("stopping (once more to stop at once)")] if running else []

    def _start_due(self, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        for process in self._processes.values():
            if self._is_due(process, now_s):
                process.phase = Phase.RUNNING
                process.life += 1
                process.started_s = now_s
                effects.append(Start(process.name, process.life))
        if not self._welcomed and now_s >= self._progress_s:
            self._progress_s = now_s + PROGRESS_S
            waited_for = ", ".join(p.name for p in self._processes.values() if not p.ready)
            effects.append(Say(f"waiting for {waited_for} ({now_s - self._began_s:.0f} s)"))
        return effects

    def _is_due(self, process: _Process, now_s: float) -> bool:
        match process.phase:
            case Phase.HELD:
                out_of_patience = now_s - self._began_s >= PATIENCE_S
                return out_of_patience or all(self._processes[name].ready for name in process.after)
            case Phase.RESTING:
                return now_s >= process.again_s
            case Phase.RUNNING | Phase.GONE:
                return False
            case _:
                assert_never(process.phase)

    def _end_due(self, now_s: float) -> list[Effect]:
        running = [p.name for p in self._processes.values() if p.phase is Phase.RUNNING]
        if not running:
            self._left = True
            return [Leave()]
        if self._stop_asked_s is not None and now_s - self._stop_asked_s >= GRACE_S:
            return self._kill(running)
        return self._stop_due()

    def _stop_due(self) -> list[Effect]:
        """Ask those to end that nobody who still runs was started after: Consul hears all goodbyes."""
        running = [p for p in self._processes.values() if p.phase is Phase.RUNNING]
        needed = {name for process in running for name in process.after}
        due = [p for p in running if not p.asked_to_stop and p.name not in needed]
        for process in due:
            process.asked_to_stop = True
        return [Stop(process.name) for process in due]

    def _kill(self, running: list[str]) -> list[Effect]:
        if self._killed or not running:
            return []
        self._killed = True
        killing: list[Effect] = [Kill(name) for name in running]
        return [Say(f"killing {', '.join(running)}"), *killing]
