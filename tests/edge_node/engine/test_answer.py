"""One answer: what it says of itself, which ids are its text, and where it ends."""

from __future__ import annotations

import msgspec
import pytest

from core.frames import Delta, Done, ItemEnd, ItemStart, Logprobs, Row, Started, Text
from edge_node.engine.engine import EngineLimits
from edge_node.engine.step import BLOCK_TOKENS
from tests.edge_node.engine.scripted import HEAD, HeadedSpeech, Node, Scripted, greedy
from tests.fakes import STOP_ID, FakeRunner, generate, said_alone

CONTEXT = 256
LIMITS = EngineLimits(slots=1, context_tokens=CONTEXT, max_waiting=4, chunk_tokens=64)


def undisturbed() -> Node:
    return Node(LIMITS, FakeRunner(1, CONTEXT))


# -- which ids are text of the answer -----------------------------------------------------------


def kinds(deltas: list[Delta]) -> list[type[Delta]]:
    return [type(delta) for delta in deltas]


def test_log_probabilities_come_with_the_answers_own_ids_and_with_no_others() -> None:
    node = Node(LIMITS, Scripted([*HEAD, 10, 11, STOP_ID], 5), HeadedSpeech())
    node.answer(greedy(top_logprobs=1))
    assert node.ids() == [*HEAD, 10, 11, STOP_ID]
    said = [kinds(row.deltas[0]) for row in node.outputs if isinstance(row, Row)]
    assert said[:5] == [[ItemStart, Text], [Text], [ItemEnd], [], []], (
        "the header's last id is not text of the answer, though the next one is"
    )
    assert said[5:] == [[ItemStart, Logprobs, Text], [Logprobs, Text], [ItemEnd]]


def test_a_continued_answer_has_log_probabilities_from_its_first_new_id_on() -> None:
    node = Node(LIMITS, Scripted([*HEAD, 10, 11, 12, STOP_ID], 5), HeadedSpeech())
    node.answer(greedy(top_logprobs=0, output_ids=[*HEAD, 10]))
    said = [kinds(row.deltas[0]) for row in node.outputs if isinstance(row, Row)]
    assert said == [[Logprobs, Text], [Logprobs, Text], [ItemEnd]]


# -- where it ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "taken", "finish"),
    [([5, STOP_ID, 9, 9], 2, "stop"), ([STOP_ID, STOP_ID], 1, "stop"), ([5, 6, 7, 8, 9, STOP_ID], 4, "length")],
)
def test_given_ids_behind_the_end_of_the_answer_are_not_heard(given: list[int], taken: int, finish: str) -> None:
    node = undisturbed()
    node.submit(generate(most=4, output_ids=given))
    done = node.ended()
    assert isinstance(done, Done)
    assert (done.finish, done.usage.output_tokens) == (finish, taken)
    assert not node.step()


@pytest.mark.parametrize("epoch", [2, 1, -1])
@pytest.mark.parametrize("runs", [True, False])
def test_a_cancel_meant_for_an_older_epoch_does_nothing(epoch: int, runs: bool) -> None:
    node, request = undisturbed(), generate(epoch=3, seed=3)
    node.submit(request)
    if runs:
        node.step()
    assert node.engine.cancel("s", epoch, 0.0) == []
    node.answer()
    assert node.ids() == said_alone(request, CONTEXT)


@pytest.mark.parametrize("epoch", [3, 4, 9])
@pytest.mark.parametrize("runs", [True, False])
def test_a_cancel_meant_for_the_epoch_or_a_newer_one_ends_the_stream(epoch: int, runs: bool) -> None:
    node = undisturbed()
    node.submit(generate(epoch=3, seed=3))
    if runs:
        node.step()
    said = len(node.ids())
    (done,) = node.engine.cancel("s", epoch, 0.0)
    assert isinstance(done, Done)
    assert (done.epoch, done.finish, done.usage.output_tokens) == (3, "cancelled", said)
    assert not node.step() and node.engine.running == node.engine.waiting == 0


# -- what it says of itself ---------------------------------------------------------------------


def test_who_gave_way_tells_of_the_first_time_it_was_let_in() -> None:
    blocks = 16
    limits = msgspec.structs.replace(LIMITS, prefix_blocks=blocks)
    node = Node(limits, FakeRunner(1, CONTEXT, blocks))
    node.answer(generate("before", "b" * BLOCK_TOKENS))
    low = generate("low", "b" * BLOCK_TOKENS + "l" * 2 * BLOCK_TOKENS, most=30, seed=3)
    node.now_s = 10.0
    node.submit(low)
    node.now_s = 10.25
    while len(node.ids("low")) < 3:
        node.step()
    node.submit(generate("high", "h", priority=1, most=4))
    node.step()
    node.now_s = 20.0
    node.answer()
    assert node.ids("low") == said_alone(low, CONTEXT)
    seated_again = [plan for plan in node.plans if plan.loads][-1]
    assert len(seated_again.loads[0].blocks) == 3, "by then all of its prompt was there"
    started, done = node.started("low"), node.ended("low")
    assert isinstance(started, Started) and isinstance(done, Done)
    assert started.cached_tokens == done.usage.cached_tokens == BLOCK_TOKENS
    timings = done.timings
    assert (timings.queue_ms, timings.prefill_ms, timings.decode_ms) == (250.0, 0.0, 9750.0)


def test_who_gave_way_before_its_prompt_was_read_counts_what_it_did_not_compute_in_the_end() -> None:
    node = Node(msgspec.structs.replace(LIMITS, prefix_blocks=16), FakeRunner(1, CONTEXT, 16))
    node.answer(generate("before", "b" * BLOCK_TOKENS))
    node.submit(generate("low", "b" * BLOCK_TOKENS + "l" * 2 * BLOCK_TOKENS, most=3, seed=3))
    node.step()
    node.answer(generate("high", "h", priority=1, most=4))
    done = node.ended("low")
    assert isinstance(done, Done)
    assert done.usage.cached_tokens == 2 * BLOCK_TOKENS, "the second block was kept, and no block counts twice"


def test_what_was_cached_at_first_stays_said_however_often_it_is_read_again() -> None:
    node = Node(msgspec.structs.replace(LIMITS, prefix_blocks=1), FakeRunner(1, CONTEXT, 1))
    low = generate("low", "b" * BLOCK_TOKENS + "l" * 2 * BLOCK_TOKENS, most=30, seed=3)
    node.answer(generate("before", "b" * BLOCK_TOKENS))
    node.submit(low)
    while len(node.ids("low")) < 3:
        node.step()
    node.submit(generate("high", "h", priority=1, most=4))
    while "high" not in {output.stream for output in node.outputs if isinstance(output, Done)}:
        node.step()
    node.step()
    node.answer(generate("higher", "x" * 2 * BLOCK_TOKENS, priority=1, most=4))
    assert node.ids("low") == said_alone(low, CONTEXT)
    done = node.ended("low")
    assert isinstance(done, Done)
    assert node.started("low").cached_tokens == done.usage.cached_tokens == BLOCK_TOKENS
