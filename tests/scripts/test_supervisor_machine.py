"""The supervisor's decisions, in simulated time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.supervisor.machine import (
    FIRST_BACKOFF_S,
    GRACE_S,
    MAX_BACKOFF_S,
    PATIENCE_S,
    PROGRESS_S,
    STEADY_S,
    Answered,
    Effect,
    Event,
    Exited,
    Interrupted,
    Kill,
    Leave,
    Say,
    Start,
    Stop,
    Supervisor,
    Ticked,
    Welcome,
)

ALONE: dict[str, tuple[str, ...]] = {"eu": ()}
FLEET: dict[str, tuple[str, ...]] = {"consul": (), "eu": ("consul",), "router": ("consul",)}


class Scene:
    """A supervisor with a clock that the test moves."""

    def __init__(self, processes: dict[str, tuple[str, ...]]) -> None:
        self.now_s = 100.0
        self.machine = Supervisor(processes, self.now_s)

    def on(self, event: Event) -> list[Effect]:
        effects = self.machine.on(event, self.now_s)
        self.machine.check_invariants()
        return effects

    def after(self, seconds: float, event: Event | None = None) -> list[Effect]:
        self.now_s += seconds
        return self.on(event or Ticked())

    def all_ready(self) -> None:
        self.on(Ticked())
        while awaited := self.machine.awaited():
            for name, life in awaited.items():
                self.on(Answered(name, life))


def silent(effects: list[Effect]) -> list[Effect]:
    return [effect for effect in effects if not isinstance(effect, Say)]


def said(effects: list[Effect]) -> str:
    return "\n".join(effect.text for effect in effects if isinstance(effect, Say))


def test_what_waits_for_nobody_starts_first_and_the_rest_when_that_is_ready() -> None:
    scene = Scene(FLEET)
    assert scene.on(Ticked()) == [Start("consul", 1)]
    assert scene.after(1.0) == []
    assert silent(scene.on(Answered("consul", 1))) == [Start("eu", 1), Start("router", 1)]


def test_nobody_waits_for_ever_for_a_consul_that_does_not_come() -> None:
    scene = Scene(FLEET)
    scene.on(Ticked())
    assert Start("eu", 1) not in scene.after(PATIENCE_S - 0.1)
    assert silent(scene.after(0.1)) == [Start("eu", 1), Start("router", 1)]


def test_the_welcome_comes_once_when_all_are_ready() -> None:
    scene = Scene(FLEET)
    scene.on(Ticked())
    scene.on(Answered("consul", 1))
    assert silent(scene.on(Answered("eu", 1))) == []
    assert scene.on(Answered("router", 1)) == [Welcome()]
    scene.on(Exited("eu", "by SIGKILL"))
    assert scene.after(FIRST_BACKOFF_S) == [Start("eu", 2)]
    assert scene.on(Answered("eu", 2)) == [Say("eu is ready again")]


def test_the_pause_before_a_restart_doubles_up_to_its_limit() -> None:
    scene = Scene(ALONE)
    scene.on(Ticked())
    pauses = []
    for _ in range(7):
        died_s = scene.now_s
        scene.on(Exited("eu", "with exit code 1"))
        while not any(isinstance(effect, Start) for effect in scene.after(0.25)):
            pass
        pauses.append(scene.now_s - died_s)
    assert pauses == [0.5, 1, 2, 4, 8, 8, 8]
    assert pauses[-1] == MAX_BACKOFF_S


def test_a_process_that_lived_long_is_forgiven() -> None:
    scene = Scene(ALONE)
    scene.on(Ticked())
    for _ in range(5):
        scene.on(Exited("eu", "with exit code 1"))
        scene.after(MAX_BACKOFF_S)
    effects = scene.after(STEADY_S, Exited("eu", "with exit code 1"))
    assert said(effects).startswith("eu ended with exit code 1 after 10.0 s; starting it again in 0.5 s")


def test_an_answer_of_an_earlier_life_counts_for_nothing() -> None:
    scene = Scene(ALONE)
    scene.on(Ticked())
    scene.on(Exited("eu", "by SIGKILL"))
    scene.after(FIRST_BACKOFF_S)
    assert scene.on(Answered("eu", 1)) == []
    assert scene.on(Answered("eu", 2)) == [Welcome()]


def test_the_person_hears_who_is_waited_for() -> None:
    scene = Scene(FLEET)
    scene.on(Ticked())
    scene.on(Answered("consul", 1))
    assert said(scene.after(PROGRESS_S)) == "waiting for eu, router (5 s)"
    assert scene.after(0.1) == []


def test_stopping_asks_everybody_and_consul_last() -> None:
    scene = Scene(FLEET)
    scene.all_ready()
    assert silent(scene.on(Interrupted())) == [Stop("eu"), Stop("router")]
    assert scene.on(Exited("eu", "with exit code 0")) == []
    assert scene.on(Exited("router", "with exit code 0")) == [Stop("consul")]
    assert scene.on(Exited("consul", "with exit code 0")) == [Leave()]
    assert scene.after(60) == []


def test_a_process_deaf_to_sigterm_is_killed_after_the_grace_period() -> None:
    scene = Scene(ALONE)
    scene.all_ready()
    scene.on(Interrupted())
    assert scene.after(GRACE_S - 0.1) == []
    assert scene.after(0.1) == [Say("killing eu"), Kill("eu")]
    assert scene.after(1) == []
    assert scene.on(Exited("eu", "by SIGKILL")) == [Leave()]


def test_the_second_interruption_kills_at_once() -> None:
    scene = Scene(FLEET)
    scene.all_ready()
    scene.on(Interrupted())
    assert silent(scene.on(Interrupted()))[:3] == [Kill("consul"), Kill("eu"), Kill("router")]


def test_nothing_is_started_again_once_stopping() -> None:
    scene = Scene(FLEET)
    scene.all_ready()
    scene.on(Exited("eu", "with exit code 1"))
    assert silent(scene.on(Interrupted())) == [Stop("router")]
    assert scene.after(FIRST_BACKOFF_S) == []


def test_an_interruption_while_everything_rests_ends_it() -> None:
    scene = Scene(ALONE)
    scene.on(Ticked())
    scene.on(Exited("eu", "with exit code 1"))
    assert scene.on(Interrupted()) == [Leave()]


Step = tuple[float, str]
STEPS = st.lists(
    st.tuples(
        st.floats(0, 12), st.sampled_from(["tick", "interrupt", "ready", "exit eu", "exit consul", "exit router"])
    ),
    max_size=60,
)


@given(STEPS)
def test_whatever_happens_only_the_living_are_signalled_and_all_end_before_leaving(steps: list[Step]) -> None:
    scene = Scene(FLEET)
    alive: set[str] = set()
    left = False
    for pause_s, what in [*steps, (0.0, "interrupt"), (GRACE_S, "tick"), *((0.0, f"exit {name}") for name in FLEET)]:
        events: list[Event]
        match what.split():
            case ["interrupt"]:
                events = [Interrupted()]
            case ["ready"]:
                events = [Answered(name, life) for name, life in scene.machine.awaited().items()]
            case ["exit", name]:
                events = [Exited(name, "by SIGKILL")] if name in alive else []
                alive.discard(name)
            case _:
                events = [Ticked()]
        scene.now_s += pause_s
        for event in events:
            for effect in scene.on(event):
                match effect:
                    case Start(name, _):
                        assert name not in alive
                        alive.add(name)
                    case Stop(name) | Kill(name):
                        assert name in alive
                    case Leave():
                        left = True
                    case Say() | Welcome():
                        pass
    assert left
    assert not alive


@pytest.mark.parametrize("event", [Ticked(), Answered("eu", 1), Exited("eu", "by SIGKILL"), Interrupted()])
def test_after_leaving_nothing_happens(event: Event) -> None:
    scene = Scene(ALONE)
    scene.on(Interrupted())
    assert scene.on(event) == []
