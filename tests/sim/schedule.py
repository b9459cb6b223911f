"""What a seed means: which fleet there is, who asks what, and what goes wrong when.

Drawn before time begins, so that a seed's world can be read (and its trace compared) without running it. After
`Plan.heals_s` nothing goes wrong any more.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TypeAlias

from core.conversation import Item
from core.stream import Request
from tests.sim.client import Manner
from tests.sim.node import POISON, Build

MODEL = "tiny"
VARIANTS = ["cpu-int8", "cpu-int8", "cuda-fp4"]
LARGE = 400


@dataclass(frozen=True, slots=True)
class Asked:
    """At a time, somebody asks for something, and behaves somehow."""

    at_s: float
    request: Request
    manner: Manner


@dataclass(frozen=True, slots=True)
class Fault:
    """kind: a method of `simulation.Faults`; whom: which node or router; args: what else it wants."""

    at_s: float
    kind: str
    whom: int
    args: tuple[float, ...] = ()


Delays: TypeAlias = list[list[float]]
"""From router to node, one way, in seconds."""


@dataclass(slots=True)
class Plan:
    """shared: the routers have one store, else each its own. store_delay: 1 = a few milliseconds."""

    nodes: list[Build]
    routers: int
    shared: bool
    store_delay: float
    delays_s: Delays
    asked: list[Asked] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    heals_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Theme:
    """What a world is about. often: the faults that it has eight times as often as others."""

    often: tuple[str, ...] = ()
    routers: tuple[int, ...] = (1, 1, 2, 2, 3)
    shared: float = 0.65
    store_delays: tuple[float, ...] = (0.2, 1.0, 1.0, 5.0)
    nodes: tuple[int, ...] = (1, 2, 3, 3, 4, 4)
    steps_s: tuple[float, ...] = (0.03, 0.1, 0.25)


THEMES = {
    "anything": Theme(),
    "nodes": Theme(("kill_node", "crash_engine", "cut_wire", "drain_node")),
    "split brain": Theme(("freeze_router",), (2, 3), 1.0, (1.0, 5.0, 20.0), nodes=(1, 2), steps_s=(0.25, 0.4)),
    "store": Theme(("fill_store", "kill_router"), store_delays=(1.0, 5.0, 20.0)),
    "flapping": Theme(("hang_engine", "stall_wire", "freeze_node", "crash_engine", "kill_node")),
    "network": Theme(("swallow", "stall_wire", "freeze_node")),
}


def planned(seed: int) -> Plan:
    """The plan of a seed."""
    chance = random.Random(f"plan {seed}")
    theme = THEMES[chance.choice(list(THEMES))]
    routers = chance.choice(theme.routers)
    nodes = [_build(chance, theme, index) for index in range(chance.choice(theme.nodes))]
    plan = Plan(
        nodes=nodes,
        routers=routers,
        shared=chance.random() < theme.shared,
        store_delay=chance.choice(theme.store_delays),
        delays_s=[[chance.choice([0.001, 0.005, 0.02, 0.08]) for _ in nodes] for _ in range(routers)],
        heals_s=chance.uniform(6.0, 14.0),
    )
    for _ in range(chance.randint(4, 11)):
        plan.asked.append(Asked(2.0 + chance.random() * (plan.heals_s - 3.0), _request(chance), _manner(chance)))
    for _ in range(chance.randint(2, 12)):
        plan.faults.append(_fault(chance, theme, 2.0 + chance.random() * (plan.heals_s - 2.5)))
    return plan


def _build(chance: random.Random, theme: Theme, index: int) -> Build:
    return Build(
        name=f"node{index}",
        variant=chance.choice(VARIANTS),
        context_tokens=chance.choice([LARGE, LARGE, LARGE, LARGE // 2, LARGE - 100]),
        slots=chance.choice([1, 2, 4]),
        max_waiting=chance.choice([1, 4, 16]),
        step_s=chance.choice(theme.steps_s),
        load_s=chance.choice([0.3, 1.5]),
        drain_s=chance.choice([0.5, 3.0]),
    )


def _request(chance: random.Random) -> Request:
    poison = f"{POISON}{chance.randrange(20)} " if chance.random() < 0.03 else ""
    words = "what is there to say of this and of that "
    items = [
        Item("message", "user" if index % 2 == 0 else "assistant", words[: chance.randint(5, 40)])
        for index in range(chance.choice([1, 1, 3, 9]))
    ]
    items.append(Item("message", "user", poison + words * chance.choice([0, 0, 1, 3]) + str(chance.randrange(10**6))))
    return Request(
        model=MODEL,
        input=items,
        temperature=1.0,
        top_p=1.0,
        max_output_tokens=chance.choice([1, 10, 64, 64, 64, 200]),
        store=chance.random() < 0.85,
        truncation=chance.choice(["auto", "auto", "disabled"]),
        reasoning={"effort": "low"} if chance.random() < 0.7 else None,
        deadline_s=chance.uniform(1.0, 8.0) if chance.random() < 0.08 else 0.0,
        service_tier="flex" if chance.random() < 0.1 else "default",
    )


def _manner(chance: random.Random) -> Manner:
    draws = chance.random

    def sometimes(probability: float, most_s: float) -> float:
        return draws() * most_s + 0.01 if draws() < probability else 0.0

    return Manner(
        delay_s=chance.choice([0.005, 0.05, 0.3, 2.0]),
        vanishings=chance.choice([0, 0, 1, 1, 2, 4]),
        away_s=chance.choice([0.1, 1.0, 3.0, 9.0]),
        stays_s=chance.choice([0.2, 1.0, 2.0]),
        returns=draws() < 0.85,
        loyal=draws() < 0.4,
        cancels_s=sometimes(0.08, 2.0),
        deletes_s=sometimes(0.06, 4.0),
        second_s=sometimes(0.3, 6.0),
        watches_s=chance.choice([1.5, 1.5, 15.0]),
    )


# How often each fault happens, and what it wants to know: ranges of further numbers.
_FAULTS: list[tuple[int, str, tuple[tuple[float, float], ...]]] = [
    (6, "kill_node", ((0.2, 4.0),)),
    (5, "crash_engine", ()),
    (3, "hang_engine", ((0.3, 6.0),)),
    (3, "freeze_node", ((0.3, 9.0),)),
    (6, "drain_node", ((0.5, 4.0),)),
    (5, "cut_wire", ((-2.0, 3.0),)),
    (4, "swallow", ((0.5, 12.0), (0.0, 3.0))),
    (3, "stall_wire", ((0.1, 4.0), (0.0, 3.0))),
    (6, "kill_router", ((0.1, 5.0),)),
    (4, "freeze_router", ((0.5, 10.0),)),
    (3, "stop_router", ((0.2, 3.0),)),
    (5, "fill_store", ((0.2, 4.0),)),
    (3, "kill_all_nodes", ((1.0, 12.0),)),
]


def _fault(chance: random.Random, theme: Theme, at_s: float) -> Fault:
    weights = [weight * (8 if kind in theme.often else 1) for weight, kind, _ in _FAULTS]
    _, kind, ranges = chance.choices(_FAULTS, weights)[0]
    return Fault(at_s, kind, chance.randrange(12), tuple(chance.uniform(*one) for one in ranges))
