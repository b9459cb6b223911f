"""Simulated time: a heap of things to do, one seeded source of chance, processes that die, freeze and wake.

Nothing here waits, and nothing asks the machine's clock. The same seed gives the same run, event by event, which is why
whatever is chosen by chance is drawn from `World.chance`, and nothing iterates over a set.
Does not know what the processes do.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeAlias

Do: TypeAlias = Callable[..., object]

EPOCH_S = 1_700_000_000
"""Unix seconds at the beginning of time."""


class World:
    """The clock, the chance and the book of what happened.

    counts: how often something of interest happened. say: where a trace goes, None = nowhere.
    """

    def __init__(self, seed: int, say: Callable[[str], None] | None = None) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.counts: Counter[str] = Counter()
        self.tracing = say is not None
        self._say = say
        self._todo: list[tuple[float, int, Do, tuple[Any, ...]]] = []
        self._count = 0

    def at(self, when_s: float, do: Do, *args: Any) -> None:
        """Do something at a time; what is due at the same moment is done in the order in which it was said."""
        self._count += 1
        heapq.heappush(self._todo, (when_s, self._count, do, args))

    def after(self, delay_s: float, do: Do, *args: Any) -> None:
        self.at(self.now + delay_s, do, *args)

    def run(self, until: Callable[[], bool], most_s: float) -> bool:
        """Let time pass until `until` holds, which is asked twice a second; False if it does not within `most_s`."""
        todo, look_at_s = self._todo, 0.0
        while todo and todo[0][0] <= most_s:
            self.now, _, do, args = heapq.heappop(todo)
            do(*args)
            if self.now >= look_at_s:
                if until():
                    return True
                look_at_s = self.now + 0.5
        return until()

    def between(self, least: float, most: float) -> float:
        return least + (most - least) * self.chance.random()

    def maybe(self, probability: float) -> bool:
        return self.chance.random() < probability

    def trace(self, who: str, what: str) -> None:
        """One line of the trace; callers ask `tracing` first where building the line costs something."""
        if self._say is not None:
            self._say(f"{self.now:9.3f}  {who:<10} {what}")

    def note(self, what: str, times: int = 1) -> None:
        """Something of interest happened: what a simulation is worth is counted in these."""
        self.counts[what] += times


class Sleep:
    """What a simulated coroutine awaits: so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __await__(self) -> Generator[float, None, None]:
        yield self.seconds


class Task:
    """A coroutine that a process runs; others of that process may await its result."""

    def __init__(self) -> None:
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None

    def __await__(self) -> Generator[float, None, Any]:
        while not self.done:
            yield 0.003
        if self.error is not None:
            raise self.error
        return self.result


class Process:
    """Something that runs, and may be killed (nothing of it goes on) or frozen (all of it goes on later).

    Invariant: what was begun in one life never happens in another.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = False
        self.frozen = False
        self.life = 0
        self._missed: list[tuple[bool, Do, tuple[Any, ...]]] = []

    @property
    def works(self) -> bool:
        return self.alive and not self.frozen

    def begin_life(self) -> None:
        self.alive, self.frozen = True, False
        self.life += 1
        self._missed = []

    def end_life(self) -> None:
        self.alive = self.frozen = False
        self.life += 1
        self._missed = []

    def freeze(self) -> None:
        self.frozen = True
        self.world.trace(self.name, "is frozen")

    def thaw(self) -> None:
        """Everything that was missed happens now: the network's things in order, the timers before or after them."""
        if not self.frozen:
            return
        self.world.trace(self.name, "wakes up")
        self.frozen = False
        missed, self._missed = self._missed, []
        if self.world.maybe(0.5):
            missed.sort(key=lambda one: not one[0])
        life = self.life
        for is_timer, do, args in missed:
            self._happen(life, is_timer, do, *args)

    def hear(self, delay_s: float, do: Do, *args: Any) -> None:
        """Something from outside reaches this life of the process after a while."""
        self.world.after(delay_s, self._happen, self.life, False, do, *args)

    def later(self, delay_s: float, do: Do, *args: Any) -> None:
        """A timer of this life."""
        self.world.after(delay_s, self._happen, self.life, True, do, *args)

    def now_or_when_awake(self, do: Do, *args: Any) -> None:
        self._happen(self.life, False, do, *args)

    def every(self, period_s: float, do: Do) -> None:
        """For this life, the first time after one period."""

        def again() -> None:
            self.later(period_s, again)
            do()

        self.later(period_s, again)

    def spawn(self, coroutine: Coroutine[float, None, Any], then: Callable[[Task], object] | None = None) -> Task:
        """Run a coroutine that awaits `Sleep`s and `Task`s. An error goes to who awaits it or to `then`, else up."""
        task = Task()
        awaited = then is not None

        def step() -> None:
            try:
                delay_s = coroutine.send(None)
            except StopIteration as stop:
                task.done, task.result = True, stop.value
            except Exception as error:
                task.done, task.error = True, error
                if not awaited:
                    raise
            else:
                self.later(delay_s, step)
                return
            if then is not None:
                then(task)

        step()
        return task

    def _happen(self, life: int, is_timer: bool, do: Do, *args: Any) -> None:
        if life != self.life:
            return
        if self.frozen:
            self._missed.append((is_timer, do, args))
        else:
            do(*args)
