"""Who goes first, who has to wait, and who has waited too long."""

from __future__ import annotations

from itertools import count

import msgspec
import pytest

from core.frames import Done, Failed, Generate, Logprobs, Progress, Row, Text
from edge_node.engine.engine import Engine, EngineLimits, Output
from edge_node.engine.logprobs import logprobs
from edge_node.engine.step import Move
from tests.fakes import (
    STOP_ID,
    TOKENIZER_SIZE,
    FakeRunner,
    FakeSpeech,
    Written,
    fake_manifest,
    generate,
    logits_after,
    said_alone,
)

CONTEXT = 256


class Node:
    def __init__(self, slots: int = 1, max_waiting: int = 8, blocks: int = 16) -> None:
        limits = EngineLimits(
            slots=slots, context_tokens=CONTEXT, max_waiting=max_waiting, chunk_tokens=64, prefix_blocks=blocks
        )
        self.engine = Engine(fake_manifest(), FakeSpeech(), limits)
        self.runner = FakeRunner(slots, CONTEXT, blocks)
        self.outputs: list[Output] = []

    def submit(self, *requests: Generate) -> None:
        for request in requests:
            self.outputs += self.engine.submit(request, 0.0)

    def steps(self, count: int) -> None:
        for _ in range(count):
            plan = self.engine.plan(0.0)
            if plan is None:
                return
            self.outputs += self.engine.commit(plan, self.runner.run(plan), 0.0)
            self.engine.check_invariants()

    def run_dry(self) -> None:
        while self.engine.running or self.engine.waiting:
            self.steps(1)

    def ids(self, stream: str) -> list[int]:
        rows = [output for output in self.outputs if isinstance(output, Row) and output.stream == stream]
        assert [row.seq for row in rows] == list(range(len(rows)))
        return [token for row in rows for token in row.ids]

    def finished(self) -> list[str]:
        return [output.stream for output in self.outputs if isinstance(output, Done)]


def unending(name: str, most: int, priority: int = 0) -> Generate:
    """A request that says as much as it may."""
    requests = (generate(name, name, most=most, seed=seed, priority=priority) for seed in count())
    return next(request for request in requests if len(said_alone(request, CONTEXT)) == most)


def test_higher_priority_is_answered_first_and_equals_in_order_of_arrival() -> None:
    node = Node()
    node.submit(generate("running", "r", priority=2, seed=3))
    node.steps(1)
    node.submit(*(generate(name, name, priority=priority) for name, priority in (("c", 0), ("d", 0), ("b", 1))))
    node.run_dry()
    assert node.finished() == ["running", "b", "c", "d"]


def test_a_slot_is_taken_for_a_higher_priority_and_nothing_is_lost() -> None:
    node, low, high = Node(), generate("low", "l" * 150, most=30, seed=3), generate("high", "h", priority=1, most=4)
    node.submit(low)
    node.steps(10)
    so_far = node.ids("low")
    assert so_far
    node.submit(high)
    node.run_dry()
    assert node.finished() == ["high", "low"]
    assert node.ids("low") == said_alone(low, CONTEXT) and node.ids("low")[: len(so_far)] == so_far
    assert node.ids("high") == said_alone(high, CONTEXT)


def test_equal_priority_takes_no_slot() -> None:
    node = Node()
    node.submit(generate("first", "f", seed=3))
    node.steps(2)
    node.submit(generate("second", "s"))
    node.run_dry()
    assert node.finished() == ["first", "second"]


def test_of_those_that_run_the_lowest_priority_and_latest_arrival_gives_way() -> None:
    node = Node(slots=3)
    for name, priority in (("a", 1), ("b", 0), ("c", 0)):
        node.submit(unending(name, 20, priority))
    node.steps(4)
    node.submit(unending("urgent", 3, priority=2))
    node.steps(1)
    assert node.engine.running == 3 and node.engine.waiting == 1
    before = len(node.ids("c"))
    node.steps(1)
    assert len(node.ids("c")) == before
    node.run_dry()
    assert sorted(node.finished()) == ["a", "b", "c", "urgent"]


def test_a_deadline_ends_a_stream_whether_it_waits_or_runs() -> None:
    node = Node()
    node.submit(
        generate("runs", "r", most=99, seed=3, deadline_s=2.0),
        generate("waits", "w", deadline_s=2.5),
        generate("patient", "p"),
    )
    node.steps(2)
    assert node.engine.expire(1.9) == []
    outputs = node.engine.expire(3.0)
    assert [(output.stream, output.code, output.retryable) for output in outputs if isinstance(output, Failed)] == [
        ("runs", "deadline_exceeded", False),
        ("waits", "deadline_exceeded", False),
    ]
    node.engine.check_invariants()
    node.run_dry()
    assert node.finished() == ["patient"]


def test_holes_in_the_batch_are_closed_when_that_pays() -> None:
    node = Node(slots=6, blocks=0)
    streams = [unending(f"s{index}", 40) for index in range(6)]
    node.submit(*streams)
    node.steps(30)
    for stream in streams[1:5]:
        node.engine.cancel(stream.stream, 1, 0.0)
    before = len(node.runner.plans)
    node.run_dry()
    plans = node.runner.plans[before:]
    assert any(plan.moves for plan in plans)
    assert {len(plan.decode.ids) for plan in plans if plan.decode} == {2, 1}
    for stream in (streams[0], streams[5]):
        assert node.ids(stream.stream) == said_alone(stream, CONTEXT)


def test_a_move_that_costs_more_than_it_saves_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_node.engine.costs.StepCosts.copy_s", lambda *_: 1e9)
    node = Node(slots=4, blocks=0)
    streams = [unending(f"s{index}", 40) for index in range(4)]
    node.submit(*streams)
    node.steps(20)
    node.engine.cancel("s1", 1, 0.0)
    node.run_dry()
    moves: list[Move] = [move for plan in node.runner.plans for move in plan.moves]
    assert moves == []


def test_each_id_comes_with_its_log_probabilities_when_they_are_asked_for() -> None:
    request = generate(most=4, seed=3)
    request = msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, top_logprobs=2))
    node = Node()
    node.submit(request)
    node.run_dry()
    rows = [output for output in node.outputs if isinstance(output, Row)]
    prefix: list[Written] = [(token, "chunk") for token in FakeSpeech().lay_out(request.items, request.release).ids]
    for row in rows:
        said = [delta for delta in row.deltas[0] if isinstance(delta, Logprobs | Text)]
        told, text = said[0], said[1]
        assert isinstance(told, Logprobs) and isinstance(text, Text), "the text follows its log-probabilities"
        chosen, top = logprobs(logits_after(prefix), row.ids[0], 2, TOKENIZER_SIZE)
        assert (told.chosen, told.top) == (chosen, top)
        assert told.text.decode() == text.text
        assert told.top_texts == [FakeSpeech().bytes_of(token) for token, _ in top]
        prefix.append((row.ids[0], "one"))


def test_a_request_without_drafts_is_computed_id_by_id() -> None:
    repeated = "abcabcabcabcabcabcabcabc" * 4
    limits = EngineLimits(slots=1, context_tokens=CONTEXT, max_waiting=1, speculation=True)
    for exact in (True, False):
        engine = Engine(fake_manifest(), FakeSpeech(), limits)
        engine.submit(generate(text=repeated, exact=exact), 0.0)
        (answer,) = engine._answers.values()
        assert (answer.sequence.speculator is None) == exact


def test_a_full_line_makes_room_for_a_higher_priority_by_refusing_who_was_not_begun() -> None:
    node = Node(slots=1, max_waiting=1)
    node.submit(unending("runs", 8, priority=1), generate("waits", "w", priority=-1))
    node.steps(2)
    node.outputs.clear()
    node.submit(generate("same", "s", priority=-1))
    assert [(frame.stream, frame.code) for frame in node.outputs if isinstance(frame, Failed)] == [
        ("same", "overloaded")
    ], "nobody leaves for an equal"
    node.outputs.clear()
    node.submit(generate("usual", "u"))
    refused, accepted = node.outputs
    assert isinstance(refused, Failed) and (refused.stream, refused.code, refused.retryable) == (
        "waits",
        "overloaded",
        True,
    )
    assert isinstance(accepted, Progress) and accepted.stream == "usual"
    node.engine.check_invariants()
    node.run_dry()
    assert node.finished() == ["runs", "usual"]


def test_who_had_to_give_way_is_never_refused_for_it() -> None:
    node, low = Node(slots=1, max_waiting=1), unending("low", 8, priority=-1)
    node.submit(low)
    node.steps(3)
    node.submit(unending("usual", 8))
    node.steps(1)
    node.submit(generate("other", "o"), generate("late", "l"))
    assert [frame.stream for frame in node.outputs if isinstance(frame, Failed)] == ["other", "late"]
    node.run_dry()
    assert node.ids("low") == said_alone(low, CONTEXT)


def test_those_who_give_way_are_counted() -> None:
    node = Node(slots=1)
    node.submit(generate("a", "a", priority=-1), generate("b", "b"), generate("c", "c", priority=-1))
    assert node.engine.yielding == 2


def test_a_refusal_under_overload_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(slots=1, max_waiting=0)
    node.submit(unending("runs", 8))
    monkeypatch.setattr(FakeSpeech, "lay_out", lambda *_: 1 / 0)
    node.submit(generate("refused", "r"))
    assert isinstance(node.outputs[-1], Failed) and node.outputs[-1].code == "overloaded"
    assert node.engine.take_faults() == []


def test_of_equal_priority_the_one_with_least_to_lose_gives_way_and_not_the_same_one_again() -> None:
    node = Node(slots=2)
    node.submit(unending("long", 30, -1))
    node.steps(8)
    node.submit(unending("short", 30, -1))
    node.steps(6)
    node.submit(unending("urgent", 2))
    node.steps(1)
    before = len(node.ids("short"))
    node.steps(2)
    assert len(node.ids("short")) == before, "it had computed less"
    while node.engine.running + node.engine.waiting == 3:
        node.steps(1)
    node.steps(1)
    written = len(node.ids("long"))
    node.submit(unending("urgent again", 2))
    node.steps(3)
    assert len(node.ids("long")) <= written + 1, "the other had just been there"
    node.run_dry()
    for name in ("long", "short"):
        assert node.ids(name) == said_alone(unending(name, 30, -1), CONTEXT)


def test_given_ids_that_end_the_answer_need_no_room() -> None:
    node = Node(slots=1, max_waiting=0)
    node.submit(unending("runs", 8))
    node.submit(generate("ended", output_ids=[5, STOP_ID], epoch=2))
    assert isinstance(node.outputs[-1], Done) and node.outputs[-1].finish == "stop"


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"top_logprobs": 21}, "top_logprobs"), ({"logit_bias": [(1, 1.0)] * 1025}, "logit_bias")],
)
def test_a_node_bounds_what_a_router_may_ask_of_it(changes: dict[str, object], param: str) -> None:
    request = generate()
    request = msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, **changes))
    node = Node()
    node.submit(request)
    (failed,) = node.outputs
    assert isinstance(failed, Failed) and (failed.code, failed.param) == ("unsupported_parameter", param)


def test_what_was_prepared_elsewhere_is_answered_the_same() -> None:
    node, request = Node(), generate("a")
    prepared = node.engine.prepare(request, 0.0)
    assert node.engine.waiting == 0
    node.outputs += node.engine.submit(prepared, 0.0)
    node.run_dry()
    assert node.ids("a") == said_alone(request, CONTEXT)
    (failed,) = node.engine.submit(node.engine.prepare(generate("b", "boom!"), 0.0), 0.0)
    assert isinstance(failed, Failed) and failed.code == "server_error"
