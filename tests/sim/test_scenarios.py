"""Disasters told one by one: what the random worlds contain somewhere, at the moment where it hurts most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from core.conversation import Item
from core.frames import Delta, ItemStart, Text
from core.stream import Request
from tests.sim import speech
from tests.sim.client import Manner
from tests.sim.node import Build
from tests.sim.oracle import Facts
from tests.sim.schedule import Asked, Plan
from tests.sim.simulation import Faults, Simulation, quiet_logs

FIRST_SEED = 1000
"""What the first client's first request is answered with."""
NODE = Build("node0", "cpu-int8", 400, slots=4, max_waiting=4, step_s=0.1, load_s=0.3, drain_s=0.5)


def asking(text: str, **changes: object) -> Request:
    fields: dict[str, object] = {
        "model": "tiny",
        "input": [Item("message", "user", text)],
        "temperature": 1.0,
        "top_p": 1.0,
        "max_output_tokens": 200,
        "reasoning": {"effort": "low"},
    }
    return Request(**(fields | changes))  # type: ignore[arg-type]


def said_to(request: Request) -> speech.Said:
    return speech.answer(speech.read(request.input, 0), FIRST_SEED, request.max_output_tokens)


def request_whose_answer(has: Callable[[list[int], list[list[Delta]]], int | None]) -> tuple[Request, int]:
    """The first of many requests in whose answer `has` finds a position."""
    for number in range(10_000):
        request = asking(f"question {number}")
        said = said_to(request)
        if (position := has(said.ids, said.deltas)) is not None:
            return request, position
    raise AssertionError("no answer has that")


def long_one() -> Request:
    return request_whose_answer(lambda ids, _: 0 if len(ids) > 50 else None)[0]


class Scene:
    """A small fleet and one request at 2 s; what happens to them is said before `play`."""

    def __init__(
        self,
        request: Request | None = None,
        *,
        nodes: int = 2,
        routers: int = 1,
        shared: bool = True,
        manner: Manner | None = None,
        heals_s: float = 20.0,
    ) -> None:
        builds = [replace(NODE, name=f"node{index}") for index in range(nodes)]
        plan = Plan(builds, routers, shared, 1.0, [[0.001 * (1 + index) for index in range(nodes)]] * routers)
        plan.heals_s = heals_s
        plan.asked.append(Asked(2.0, request or long_one(), manner or Manner(delay_s=0.005)))
        self.simulation = Simulation(plan, seed=1)
        self.world = self.simulation.world
        self.faults = Faults(self.simulation)

    @property
    def facts(self) -> Facts:
        (facts,) = self.simulation.oracle.book.values()
        return facts

    @property
    def node(self) -> int:
        """Which node answers."""
        return next(index for index, node in enumerate(self.simulation.nodes) if node.engine.streams)

    def when(self, condition: Callable[[], bool], do: Callable[[], object]) -> None:
        """Do something once, a millisecond after a condition holds at the latest."""
        if condition():
            do()
        else:
            self.world.after(0.001, self.when, condition, do)

    def when_written(self, count: int, do: Callable[[], object]) -> None:
        """When so many ids are in the store."""
        self.when(lambda: bool(self.simulation.oracle.book) and self.facts.count >= count, do)

    def play(self) -> None:
        """Raises Violation when the oracle finds anything wrong."""
        with quiet_logs(None):
            self.simulation.run()

    def assert_complete(self) -> None:
        facts = self.facts
        assert facts.ended is not None
        assert facts.ended.end.status == "completed"
        assert facts.ended.ids == said_to(facts.record.request).ids
        assert all(log.ended for log in facts.logs)


def test_a_node_killed_while_it_reads_the_prompt_is_replaced_and_nothing_is_said_twice() -> None:
    scene = Scene(asking("a long question " * 20))
    scene.when(
        lambda: any(node.engine.running for node in scene.simulation.nodes),
        lambda: scene.faults.kill_node(scene.node, 9.0),
    )
    scene.play()
    assert scene.world.counts["failover"] == 1
    scene.assert_complete()


def test_a_node_killed_in_the_middle_of_a_character() -> None:
    def half(ids: list[int], deltas: list[list[Delta]]) -> int | None:
        found = (i for i in range(5, len(ids) - 5) if ids[i] in speech.HALVES and ids[i + 1] == speech.MIDDLE)
        return next(found, None)

    request, position = request_whose_answer(half)
    scene = Scene(request)
    scene.when_written(position + 1, lambda: scene.faults.kill_node(scene.node, 9.0))
    scene.play()
    assert scene.world.counts["failover"] == 1
    scene.assert_complete()


def test_a_node_killed_in_the_middle_of_a_json_argument() -> None:
    def inside(ids: list[int], deltas: list[list[Delta]]) -> int | None:
        calls = (i for i, said in enumerate(deltas) if said and isinstance(said[0], ItemStart) and said[0].name)
        return next(
            (i + 3 for i in calls if all(ids[j] in speech.WORDS for j in range(i + 1, min(i + 6, len(ids))))), None
        )

    request, position = request_whose_answer(inside)
    scene = Scene(request)
    scene.when_written(position, lambda: scene.faults.kill_node(scene.node, 9.0))
    scene.play()
    assert scene.world.counts["failover"] == 1
    scene.assert_complete()


def test_with_no_other_node_a_stream_waits_for_its_own_to_come_back() -> None:
    scene = Scene(nodes=1)
    scene.when_written(10, lambda: scene.faults.kill_node(0, 2.0))
    scene.play()
    scene.assert_complete()


def test_with_no_node_for_longer_than_it_waits_it_fails_and_what_was_said_is_kept() -> None:
    scene = Scene(nodes=1)
    scene.when_written(10, lambda: scene.faults.kill_node(0, 12.0))
    scene.play()
    ended = scene.facts.ended
    assert ended is not None
    assert ended.end.error is not None
    assert (ended.end.error.code, ended.end.error.retryable) == ("node_lost", True)
    assert len(ended.ids) >= 10


def test_a_router_killed_between_the_write_and_the_delivery_says_the_rest_in_its_next_life() -> None:
    scene = Scene()
    # The oracle hears of an entry when the database has it, which is before the router does.
    scene.when_written(10, lambda: scene.faults.kill_router(0, 1.0))
    scene.play()
    assert scene.world.counts["adopted"] == 1
    assert scene.world.counts["resumed readers"] == 1
    scene.assert_complete()


def test_a_frozen_router_that_wakes_after_another_has_taken_over_says_nothing_new() -> None:
    patient = Manner(delay_s=0.005, watches_s=30.0)
    scene = Scene(asking("slow"), nodes=1, routers=2, manner=patient, heals_s=25.0)
    request = long_one()
    scene.simulation.plan.asked[0] = Asked(2.0, request, patient)
    home = scene.simulation.routers

    def freeze() -> None:
        (router,) = [one for one in home if len(one.sessions)]
        scene.faults.freeze_router(home.index(router), 12.0)

    scene.when_written(10, freeze)
    scene.play()
    assert scene.world.counts["adopted"] == 1
    facts = scene.facts
    assert facts.ended is not None
    # Its one reader hung on the frozen router: for the other it was an orphan, so there may be an end before the end.
    assert facts.ended.end.status in {"completed", "cancelled"}
    assert all(log.ended for log in facts.logs)


def test_a_full_store_stops_the_stream_without_an_end_and_it_goes_on_when_there_is_room() -> None:
    scene = Scene()
    scene.when_written(10, lambda: scene.faults.fill_store(0, 3.0))
    scene.play()
    assert scene.world.counts["told: store_unavailable"] >= 1
    assert scene.world.counts["adopted"] >= 1
    scene.assert_complete()


def test_all_nodes_drain_one_after_another_and_nobody_notices() -> None:
    scene = Scene(nodes=3)

    def drain_it(left: int) -> None:
        whom = scene.node
        scene.faults.drain_node(whom, 0.0)
        if left:
            written = scene.facts.count
            scene.when_written(written + 12, lambda: drain_it(left - 1))

    scene.when_written(5, lambda: drain_it(2))
    scene.play()
    assert scene.world.counts["handoff"] == 3
    scene.assert_complete()


def test_everything_is_restarted_one_by_one_while_an_answer_is_being_given() -> None:
    scene = Scene(nodes=2, routers=2)
    for index in range(2):
        scene.world.at(2.6 + index, scene.faults.stop_router, index, 0.3)
        scene.world.at(3.1 + index, scene.faults.drain_node, index, 0.2)
    scene.play()
    assert scene.world.counts["orderly stops"] == 2
    scene.assert_complete()


def test_two_readers_of_one_response_hear_the_same_while_its_node_dies() -> None:
    scene = Scene(manner=Manner(delay_s=0.005, second_s=0.4))
    scene.when_written(15, lambda: scene.faults.kill_node(scene.node, 9.0))
    scene.play()
    scene.assert_complete()
    first, second = scene.facts.logs
    assert first.events == second.events


def test_an_engine_that_hangs_costs_a_pause_and_is_no_crash() -> None:
    scene = Scene(nodes=1)
    scene.when_written(10, lambda: scene.faults.hang_engine(0, 60.0))
    scene.play()
    assert scene.world.counts["hung engines killed"] == 1
    scene.assert_complete()


def test_text_is_said_at_all() -> None:
    """The fake speech has what the scenes need: text, silence, and answers of one id."""
    said = said_to(long_one())
    assert any(isinstance(delta, Text) for deltas in said.deltas for delta in deltas)
    assert [] in said.deltas
    request_whose_answer(lambda ids, _: 0 if len(ids) == 1 else None)
