"""Whether the engine process can be vouched for, and when it is to be killed or started again.

    waiting --started--> loading --loaded--> ready --ended--> waiting (after a backoff)

Knows processes only by what is reported here; `now_s` is any steady clock. Rules: docs/decisions/030.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from core.frames import EngineState, Rates
from edge_node.runtime.pipe import Beat

Phase: TypeAlias = Literal["waiting", "loading", "ready"]

# A step may take three times its prediction and a second; an idle engine must have beaten within a second.
STEP_FACTOR = 3.0
GRACE_S = 1.0
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 8.0
# An engine that served this long did not die of its start.
LIVED_S = 20.0


@dataclass(frozen=True, slots=True)
class Patience:
    """load_s: for loading; hang_s: without being vouched for, before the process is killed."""

    load_s: float = 300.0
    hang_s: float = 30.0


class Supervisor:
    """Follows one engine process after another.

    Invariant: `retry_at_s` is the time of the next start while `phase` is "waiting"; `vouched` implies "ready".
    """

    def __init__(self, patience: Patience, now_s: float) -> None:
        self.phase: Phase = "waiting"
        self.restarts = 0
        self.retry_at_s = now_s
        self._patience = patience
        self._backoff_s = FIRST_BACKOFF_S
        self._since_s = now_s
        self._beat: Beat | None = None
        self._beat_at_s = now_s
        self._vouched_at_s = now_s

    # -- what happened ---------------------------------------------------------------------------

    def started(self, now_s: float) -> None:
        self.phase = "loading"
        self._since_s = now_s
        self._beat = None

    def loaded(self, now_s: float) -> None:
        self.phase = "ready"
        self._since_s = self._beat_at_s = self._vouched_at_s = now_s
        self._beat = None

    def beat(self, beat: Beat, now_s: float) -> None:
        self._beat, self._beat_at_s = beat, now_s

    def ended(self, now_s: float) -> None:
        """The process is gone: the next start waits twice as long as the last one, unless this one had lived."""
        if self.phase == "ready" and now_s - self._since_s >= LIVED_S:
            self._backoff_s = FIRST_BACKOFF_S
        self.phase = "waiting"
        self.restarts += 1
        self.retry_at_s = now_s + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
        self._beat = None

    # -- what follows ----------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        """As routers are told: "failed" is the pause between a death and the next start."""
        match self.phase:
            case "ready":
                return "ready"
            case "loading":
                return "loading"
            case "waiting":
                return "failed" if self.restarts else "loading"

    def vouched(self, now_s: float) -> bool:
        """Whether the engine is taken to be alive and moving."""
        if self.phase != "ready":
            return False
        silent_s = now_s - self._beat_at_s
        beat = self._beat
        if beat is None or beat.age_s < 0:
            return silent_s <= GRACE_S
        return beat.age_s + silent_s <= STEP_FACTOR * beat.predicted_s + GRACE_S

    def why_kill(self, now_s: float) -> str | None:
        """One clause that says why the process must be killed now, or None. Call it a few times a second."""
        match self.phase:
            case "waiting":
                return None
            case "loading":
                if now_s - self._since_s > self._patience.load_s:
                    return f"it did not load within {self._patience.load_s:g} s"
                return None
            case "ready":
                if self.vouched(now_s):
                    self._vouched_at_s = now_s
                    return None
                if now_s - self._vouched_at_s > self._patience.hang_s:
                    return f"it did not move for {self._patience.hang_s:g} s"
                return None

    @property
    def running(self) -> int:
        return self._beat.running if self._beat else 0

    @property
    def waiting(self) -> int:
        return self._beat.waiting if self._beat else 0

    @property
    def yielding(self) -> int:
        return self._beat.yielding if self._beat else 0

    @property
    def rates(self) -> Rates:
        return self._beat.rates if self._beat else Rates()

    @property
    def step(self) -> int:
        """Steps of the present process."""
        return self._beat.step if self._beat else 0
