"""Random arrivals, priorities, deadlines, cancels and epochs over a full prefix store and random drafts: every stream
says what it says alone, continued exactly or fast, and ends exactly once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.conversation import Item
from core.frames import Done, Failed, Generate, Progress, Row, Started
from edge_node.engine.engine import Engine, EngineLimits, Output
from edge_node.engine.speculation import Speculator
from edge_node.engine.step import StepPlan
from tests.fakes import FakeRunner, FakeSpeech, fake_manifest, generate, said_alone

CONTEXT = 300
SLOTS = 3
BLOCKS = 7
# Conversations begin alike, as they do under one system prompt, and differ later on.
HEADS = ("a" * 130, "b" * 64, "c" * 63, "")


class Guesses(Speculator):
    """Drafts the fake model's own answer, every third id changed: some drafts hold, some do not."""

    answer: ClassVar[dict[tuple[int, ...], list[int]]] = {}

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(ids)
        self._prompt = tuple(ids)
        self._heard = 0

    def push(self, token: int) -> None:
        self._heard += 1

    def draft(self, lengths: Sequence[int], plain_s: float, verify_s: Callable[[int], float]) -> list[int]:
        if not lengths:
            return []
        ahead = self.answer.get(self._prompt, [])[self._heard : self._heard + lengths[-1] - 1]
        draft = [token if (self._heard + index) % 3 else token + 1 for index, token in enumerate(ahead)]
        return draft if len(draft) + 1 in lengths else []


@dataclass
class Heard:
    """What one (stream, epoch) has been told so far."""

    request: Generate
    ids: list[int]
    started: int = 0
    ends: list[Done | Failed] = field(default_factory=list)


class Conversations(RuleBasedStateMachine):
    drafts = False
    fast = False

    def __init__(self) -> None:
        super().__init__()
        limits = EngineLimits(
            slots=SLOTS,
            context_tokens=CONTEXT,
            max_waiting=3,
            chunk_tokens=48,
            max_stall_ms=24,
            prefix_blocks=BLOCKS,
            speculation=self.drafts,
            failover_exact_s=0.0 if self.fast else float("inf"),
        )
        self.engine = Engine(fake_manifest(), FakeSpeech(), limits)
        # A draft is verified on the other path; what it may change there is another test's business.
        self.runner = FakeRunner(SLOTS, CONTEXT, BLOCKS, paths_differ=not self.drafts)
        self.now_s = 0.0
        self.alone: dict[str, list[int]] = {}
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
                    assert computed <= output.total

    def send(self, request: Generate) -> None:
        before = self.heard.get(request.stream)
        if before is not None:
            self.replaced.append(before)
        self.heard[request.stream] = Heard(request, list(request.output_ids))
        reads = self.fast and not request.exact
        said = said_alone(request, CONTEXT, paths_differ=not self.drafts, given_read=reads)
        assert reads or before is None or said == self.alone[request.stream], "an exact continuation changed something"
        self.alone[request.stream] = said
        Guesses.answer[tuple(prompt_of(request))] = said
        self.hear(self.engine.submit(request, self.now_s))

    @rule(
        head=st.sampled_from(HEADS),
        letters=st.integers(1, 180),
        seed=st.integers(0, 2**64),
        greedy=st.booleans(),
        most=st.integers(1, 20),
        priority=st.sampled_from((0, 0, 0, 1, -1)),
        deadline_s=st.sampled_from((0.0, 0.0, 3.0)),
        salt=st.sampled_from(("", "", "another tenant")),
        exact=st.sampled_from((False, False, True)),
    )
    def a_stream_arrives(
        self,
        head: str,
        letters: int,
        seed: int,
        greedy: bool,
        most: int,
        priority: int,
        deadline_s: float,
        salt: str,
        exact: bool,
    ) -> None:
        self.streams += 1
        text = head + "".join(chr(97 + (seed + index * index) % 26) for index in range(letters))
        self.send(
            generate(
                f"s{self.streams}",
                text,
                seed=seed,
                temperature=0.0 if greedy else 0.8,
                most=most,
                priority=priority,
                deadline_s=deadline_s,
                salt=salt,
                exact=exact,
            )
        )

    @precondition(lambda self: self.heard)
    @rule(data=st.data(), letters=st.integers(1, 70))
    def a_conversation_goes_on(self, data: st.DataObject, letters: int) -> None:
        heard = self.heard[data.draw(st.sampled_from(sorted(self.heard)))]
        if not heard.ends or len(prompt_of(heard.request)) + len(heard.ids) + letters >= CONTEXT:
            return
        self.streams += 1
        release = heard.request.release
        answer = Item("message", "assistant", "", heard.ids, release)
        items = [*heard.request.items, answer, Item("message", "user", "z" * letters)]
        self.send(generate(f"s{self.streams}", items=items, salt=heard.request.cache_salt))

    @rule(seconds=st.floats(0.1, 5.0))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.hear(self.engine.expire(self.now_s))

    @precondition(lambda self: self.heard)
    @rule(data=st.data())
    def a_stream_is_continued_under_a_new_epoch(self, data: st.DataObject) -> None:
        heard = self.heard[data.draw(st.sampled_from(sorted(self.heard)))]
        old = heard.request
        self.send(msgspec.structs.replace(old, epoch=old.epoch + 1, output_ids=list(heard.ids)))

    @precondition(lambda self: self.heard)
    @rule(data=st.data(), older=st.booleans())
    def a_stream_is_cancelled(self, data: st.DataObject, older: bool) -> None:
        heard = self.heard[data.draw(st.sampled_from(sorted(self.heard)))]
        outputs = self.engine.cancel(heard.request.stream, heard.request.epoch - older, self.now_s)
        assert not (older and outputs)
        self.hear(outputs)

    @precondition(lambda self: self.plan is None)
    @rule()
    def a_step_begins(self) -> None:
        self.plan = self.engine.plan(self.now_s)

    @precondition(lambda self: self.plan is not None)
    @rule()
    def a_step_ends(self) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        self.hear(self.engine.commit(plan, self.runner.run(plan), self.now_s))

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
        for stream, heard in self.heard.items():
            assert heard.ids == self.alone[stream][: len(heard.ids)]
            if heard.ends and isinstance(heard.ends[0], Done) and heard.ends[0].finish != "cancelled":
                assert heard.ids == self.alone[stream]

    def teardown(self) -> None:
        while self.plan is not None or not self.engine.resting:
            if self.plan is None:
                self.a_step_begins()
            if self.plan is not None:
                self.a_step_ends()
            self.engine.check_invariants()
        self.every_stream_says_what_it_says_alone()
        assert all(len(heard.ends) == 1 for heard in self.heard.values())
        assert all(len(heard.ends) <= 1 for heard in self.replaced)


class DraftedConversations(Conversations):
    drafts = True

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("edge_node.engine.prepare.Speculator", Guesses)

    def teardown(self) -> None:
        super().teardown()
        self.patch.undo()


class HurriedConversations(Conversations):
    """Answers are continued by reading what was said, but for those that must be exact."""

    fast = True


def prompt_of(request: Generate) -> list[int]:
    return FakeSpeech().lay_out(request.items, request.release).ids


Conversations.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
DraftedConversations.TestCase.settings = Conversations.TestCase.settings
HurriedConversations.TestCase.settings = Conversations.TestCase.settings
TestConversations = Conversations.TestCase
TestDraftedConversations = DraftedConversations.TestCase
TestHurriedConversations = HurriedConversations.TestCase
