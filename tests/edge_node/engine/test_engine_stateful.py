"""Random arrivals, cancels and epochs: every stream says what it says alone, and ends exactly once."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.frames import Done, Failed, Generate, Progress, Row, Started
from edge_node.engine.engine import Engine, EngineLimits, Output
from edge_node.engine.step import StepPlan
from tests.fakes import FakeRunner, FakeSpeech, fake_manifest, generate, said_alone

CONTEXT = 40
SLOTS = 3


@dataclass
class Heard:
    """What one (stream, epoch) has been told so far."""

    request: Generate
    ids: list[int]
    started: int = 0
    ends: list[Done | Failed] = field(default_factory=list)


class Conversations(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        limits = EngineLimits(slots=SLOTS, context_tokens=CONTEXT, max_waiting=3, chunk_tokens=8, max_stall_ms=4)
        self.engine = Engine(fake_manifest(), FakeSpeech(), limits)
        self.runner = FakeRunner(SLOTS, CONTEXT)
        self.heard: dict[str, Heard] = {}
        self.replaced: list[Heard] = []
        self.plan: StepPlan | None = None
        self.streams = 0

    def hear(self, outputs: list[Output]) -> None:
        for output in outputs:
            heard = self.heard[output.stream]
            assert output.epoch == heard.request.epoch, "a dead epoch spoke"
            assert not heard.ends, "something followed the end"
            match output:
                case Row(seq=seq, ids=ids, deltas=deltas):
                    assert heard.started == 1 and seq == len(heard.ids) and len(ids) == len(deltas)
                    heard.ids += ids
                case Started():
                    heard.started += 1
                case Done() | Failed():
                    heard.ends.append(output)
                case Progress(computed=computed):
                    assert heard.started == (computed > 0), "accepted first, started once something is computed"

    def send(self, request: Generate) -> None:
        before = self.heard.get(request.stream)
        if before is not None:
            self.replaced.append(before)
        self.heard[request.stream] = Heard(request, list(request.output_ids))
        self.hear(self.engine.submit(request, 0.0))

    @rule(
        letters=st.integers(1, CONTEXT + 2), seed=st.integers(0, 2**64), greedy=st.booleans(), most=st.integers(1, 20)
    )
    def a_stream_arrives(self, letters: int, seed: int, greedy: bool, most: int) -> None:
        self.streams += 1
        name = f"s{self.streams}"
        text = "".join(chr(97 + (seed + index * index) % 26) for index in range(letters))
        self.send(generate(name, text, seed=seed, temperature=0.0 if greedy else 0.8, most=most))

    @precondition(lambda self: self.heard)
    @rule(data=st.data())
    def a_stream_is_continued_under_a_new_epoch(self, data: st.DataObject) -> None:
        heard = self.heard[data.draw(st.sampled_from(sorted(self.heard)))]
        old = heard.request
        text = old.items[0].text
        again = generate(
            old.stream,
            text,
            epoch=old.epoch + 1,
            output_ids=heard.ids,
            seed=old.seed,
            temperature=old.sampling.temperature,
            most=old.max_output_tokens,
        )
        self.send(again)

    @precondition(lambda self: self.heard)
    @rule(data=st.data(), older=st.booleans())
    def a_stream_is_cancelled(self, data: st.DataObject, older: bool) -> None:
        heard = self.heard[data.draw(st.sampled_from(sorted(self.heard)))]
        outputs = self.engine.cancel(heard.request.stream, heard.request.epoch - older, 0.0)
        assert not (older and outputs)
        self.hear(outputs)

    @precondition(lambda self: self.plan is None)
    @rule()
    def a_step_begins(self) -> None:
        self.plan = self.engine.plan(0.0)

    @precondition(lambda self: self.plan is not None)
    @rule()
    def a_step_ends(self) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        self.hear(self.engine.commit(plan, self.runner.run(plan), 0.0))

    @rule(steps=st.integers(1, 10))
    def steps_follow_each_other(self, steps: int) -> None:
        for _ in range(steps):
            if self.plan is None:
                self.a_step_begins()
            if self.plan is not None:
                self.a_step_ends()

    @invariant()
    def the_engine_is_consistent(self) -> None:
        self.engine.check_invariants()

    @invariant()
    def every_stream_says_what_it_says_alone(self) -> None:
        for heard in self.heard.values():
            if heard.ids:
                alone = said_alone(heard.request, CONTEXT)
                assert heard.ids == alone[: len(heard.ids)]
            if heard.ends and isinstance(heard.ends[0], Done) and heard.ends[0].finish != "cancelled":
                assert heard.ids == said_alone(heard.request, CONTEXT)

    def teardown(self) -> None:
        while self.plan is not None or self.engine.running or self.engine.waiting:
            self.steps_follow_each_other(1)
            self.engine.check_invariants()
        self.every_stream_says_what_it_says_alone()
        assert all(len(heard.ends) == 1 for heard in self.heard.values())
        assert all(len(heard.ends) <= 1 for heard in self.replaced)


Conversations.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestConversations = Conversations.TestCase
