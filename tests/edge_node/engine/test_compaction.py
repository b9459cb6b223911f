"""When the last of those that write is moved into a hole of the batch: it is taken to go on as it has gone on."""

from __future__ import annotations

from itertools import count

from core.frames import Generate
from edge_node.engine.engine import EngineLimits
from edge_node.engine.step import Decode, Move, StepPlan, StepResult
from tests.edge_node.engine.scripted import Node
from tests.fakes import FakeRunner, generate, said_alone

CONTEXT = 256
PROMPT_TOKENS = 100
LIMITS = EngineLimits(slots=3, context_tokens=CONTEXT, max_waiting=4, chunk_tokens=64, max_stall_ms=1000.0)


def unending(name: str, most: int) -> Generate:
    """A request that says as much as it may."""
    requests = (generate(name, "x" * PROMPT_TOKENS, most=most, seed=seed) for seed in count())
    return next(request for request in requests if len(said_alone(request, CONTEXT)) == most)


def moves_when_left(said: int, most: int) -> list[Move]:
    """What is moved once the middle one of three leaves and the last has said so much of what it may say.

    A row less saves 1 ms a step, and copying the last one takes a little more than 10 ms.
    """
    node = Node(LIMITS, FakeRunner(3, CONTEXT))
    for rows in (1, 2, 3):
        decode = Decode(0, [0] * rows, [1] * rows, [])
        node.engine.learn(StepPlan(0, None, decode, 0.0), StepResult(None, None, decode_s=0.01 + 0.001 * rows))
    copy = StepPlan(0, None, None, 0.0, [Move(0, 1, 1000)])
    node.engine.learn(copy, StepResult(None, None, copy_s=0.1))
    first, leaves, last = unending("first", 100), unending("leaves", 100), unending("last", most)
    node.submit(first, leaves)
    while not node.ids("leaves"):
        node.step()
    node.submit(last)
    while len(node.ids("last")) < said:
        node.step()
    node.engine.cancel("leaves", 1, 0.0)
    before = len(node.plans)
    node.step()
    moves = node.plans[before].moves
    node.answer()
    for request in (first, last):
        assert node.ids(request.stream) == said_alone(request, CONTEXT)
    return moves


def test_a_newcomer_is_not_moved_for_a_copy_that_one_step_does_not_pay() -> None:
    assert moves_when_left(said=1, most=100) == []


def test_one_that_has_said_as_much_as_pays_the_copy_is_moved() -> None:
    assert moves_when_left(said=40, most=100) == [Move(2, 1, PROMPT_TOKENS + 39)]


def test_one_that_may_say_little_more_is_not_moved_however_much_it_has_said() -> None:
    assert moves_when_left(said=40, most=42) == []
