"""What was read is not read again: across turns, across requests, for the tenant that it belongs to."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest

from core.conversation import Item, prefix_keys
from core.frames import Delta, Done, Generate, Row, Started
from core.stream import output_items
from edge_node.engine.engine import Engine, EngineLimits, Output
from edge_node.engine.speech import PLAIN, Rendered, Setting
from edge_node.engine.step import BLOCK_TOKENS
from tests.fakes import FakeRunner, FakeSpeech, fake_manifest, generate, said_alone

CONTEXT = 512
SYSTEM = "s" * 3 * BLOCK_TOKENS


class Fleet:
    """One engine with its runner, and what it has said."""

    def __init__(
        self, blocks: int = 64, slots: int = 2, max_stall_ms: float = 40.0, speech: FakeSpeech | None = None
    ) -> None:
        limits = EngineLimits(
            slots=slots,
            context_tokens=CONTEXT,
            max_waiting=8,
            chunk_tokens=BLOCK_TOKENS,
            max_stall_ms=max_stall_ms,
            prefix_blocks=blocks,
        )
        self.engine = Engine(fake_manifest(), speech or FakeSpeech(), limits)
        self.runner = FakeRunner(slots, CONTEXT, blocks)
        self.outputs: list[Output] = []

    def step(self) -> list[Output] | None:
        """None when there is nothing to do."""
        plan = self.engine.plan(0.0)
        if plan is None:
            return None
        outputs = self.engine.commit(plan, self.runner.run(plan), 0.0)
        self.engine.check_invariants()
        self.outputs += outputs
        return outputs

    def answer(self, *requests: Generate) -> list[Output]:
        """All that is said until the last of them is answered, but nothing that an idle engine does."""
        outputs = [output for request in requests for output in self.engine.submit(request, 0.0)]
        while self.engine.running or self.engine.waiting:
            outputs += self.step() or []
        return outputs

    def rest(self) -> None:
        """Whatever an idle engine does."""
        while not self.engine.resting:
            self.step()

    def tokens_read(self) -> int:
        return sum(len(plan.chunk.ids) for plan in self.runner.plans if plan.chunk)


def ids_of(outputs: Iterable[Output]) -> list[int]:
    return [token for output in outputs if isinstance(output, Row) for token in output.ids]


def deltas_of(outputs: Iterable[Output]) -> list[list[Delta]]:
    return [deltas for output in outputs if isinstance(output, Row) for deltas in output.deltas]


def cached(outputs: Iterable[Output]) -> list[int]:
    return [output.cached_tokens for output in outputs if isinstance(output, Started)]


def next_turn(request: Generate, said: list[int], text: str = "and then?") -> Generate:
    answer = Item("message", "assistant", "", said, request.release)
    items = [*request.items, answer, Item("message", "user", text)]
    return msgspec.structs.replace(request, stream=request.stream + "+", items=items)


def test_requests_with_the_same_beginning_read_it_once() -> None:
    fleet = Fleet()
    first, second = generate("a", SYSTEM + "one"), generate("b", SYSTEM + "two", seed=9)
    assert cached(fleet.answer(first)) == [0]
    outputs = fleet.answer(second)
    assert cached(outputs) == [3 * BLOCK_TOKENS]
    assert ids_of(outputs) == said_alone(second, CONTEXT)


def test_another_tenant_finds_nothing_of_it() -> None:
    fleet = Fleet()
    fleet.answer(generate("a", SYSTEM, salt="mine"))
    assert cached(fleet.answer(generate("b", SYSTEM, salt="yours"))) == [0]
    assert cached(fleet.answer(generate("c", SYSTEM, salt="mine"))) == [3 * BLOCK_TOKENS - 1]


def test_without_a_store_every_prompt_is_read_whole() -> None:
    fleet = Fleet(blocks=0)
    fleet.answer(generate("a", SYSTEM))
    assert cached(fleet.answer(generate("b", SYSTEM))) == [0]


def test_a_prompt_that_is_resident_to_its_last_id_is_sampled_from_all_the_same() -> None:
    fleet, request = Fleet(), generate("a", SYSTEM)
    fleet.answer(request)
    before = fleet.tokens_read()
    again = msgspec.structs.replace(request, stream="b")
    outputs = fleet.answer(again)
    assert ids_of(outputs) == said_alone(again, CONTEXT)
    assert cached(outputs) == [3 * BLOCK_TOKENS - 1] and fleet.tokens_read() - before == 2, "two, never a lone one"


def test_a_request_that_was_cancelled_while_reading_leaves_what_it_read() -> None:
    fleet = Fleet()
    fleet.engine.submit(generate("a", SYSTEM + SYSTEM), 0.0)
    fleet.step()
    fleet.step()
    fleet.engine.cancel("a", 1, 0.0)
    assert cached(fleet.answer(generate("b", SYSTEM + SYSTEM))) == [2 * BLOCK_TOKENS]


def test_the_next_turn_finds_the_answer_too_once_the_engine_was_idle() -> None:
    fleet, request = Fleet(), generate("a", "u" * 60, most=100, seed=5)
    said = ids_of(fleet.answer(request))
    assert len(said) > BLOCK_TOKENS
    hurried = next_turn(request, said)
    assert cached(fleet.answer(hurried)) == [0], "the answer was computed one by one, which are other bits"
    patient, fleet = next_turn(request, said), Fleet()
    fleet.answer(request)
    fleet.rest()
    outputs = fleet.answer(patient)
    assert cached(outputs) == [(60 + len(said)) // BLOCK_TOKENS * BLOCK_TOKENS]
    assert ids_of(outputs) == said_alone(patient, CONTEXT)


def test_history_that_is_written_differently_later_is_read_as_it_will_be() -> None:
    """As gpt-oss drops its reasoning: here every answer but the last loses its first ten ids."""

    class Forgetful(FakeSpeech):
        def lay_out(self, items: list[Item], *others: object) -> Rendered:
            kept = [
                msgspec.structs.replace(item, ids=item.ids[10:])
                if item.ids and any(later.role == "user" for later in items[index:])
                else item
                for index, item in enumerate(items)
            ]
            return super().lay_out(kept, "")

    fleet, request = Fleet(speech=Forgetful()), generate("a", "u" * 60, most=100, seed=5)
    said = ids_of(fleet.answer(request))
    fleet.rest()
    outputs = fleet.answer(next_turn(request, said))
    assert cached(outputs) == [(60 + len(said) - 10) // BLOCK_TOKENS * BLOCK_TOKENS]


def test_re_reading_waits_while_others_are_answered_and_goes_on_afterwards() -> None:
    fleet, request = Fleet(slots=2, max_stall_ms=16), generate("a", "u" * 60, most=100, seed=5)
    said = ids_of(fleet.answer(request))
    fleet.step()
    chunk = fleet.runner.plans[-1].chunk
    assert fleet.engine.running == 0 and chunk is not None, "it is re-reading"
    assert len(chunk.ids) <= 16, "no longer than others may be held up"
    other = generate("b", "somebody else")
    before = len(fleet.runner.plans)
    assert ids_of(fleet.answer(other)) == said_alone(other, CONTEXT)
    between = [plan.chunk.slot for plan in fleet.runner.plans[before:] if plan.chunk]
    assert chunk.slot not in between
    fleet.rest()
    assert cached(fleet.answer(next_turn(request, said))) == [(60 + len(said)) // BLOCK_TOKENS * BLOCK_TOKENS]


def test_re_reading_is_given_up_when_its_slot_is_needed() -> None:
    fleet, request = Fleet(slots=1, max_stall_ms=16), generate("a", "u" * 60, most=100, seed=5)
    said = ids_of(fleet.answer(request))
    fleet.step()
    other = generate("b", "somebody else")
    assert ids_of(fleet.answer(other)) == said_alone(other, CONTEXT)
    fleet.rest()
    assert cached(fleet.answer(next_turn(request, said))) == [0]


def test_a_store_smaller_than_a_prompt_keeps_its_beginning() -> None:
    fleet = Fleet(blocks=2)
    fleet.answer(generate("a", SYSTEM))
    fleet.rest()
    assert cached(fleet.answer(generate("b", SYSTEM))) == [2 * BLOCK_TOKENS]


def test_routers_are_told_under_their_own_keys_what_is_resident() -> None:
    fleet, items = Fleet(), [Item("message", "system", SYSTEM), Item("message", "user", "u" * 70)]
    request = generate("a", items=items, salt="mine", most=80, seed=5)
    keys = prefix_keys(items, request.release, "mine")
    request = msgspec.structs.replace(request, prefix_keys=keys)
    said = ids_of(fleet.answer(request))
    assert dict(fleet.engine.take_chains()) == {keys[0]: 3 * BLOCK_TOKENS, keys[1]: 4 * BLOCK_TOKENS}
    assert fleet.engine.take_chains() == []
    fleet.rest()
    ((key, tokens),) = fleet.engine.take_chains()
    assert tokens == (len(SYSTEM) + 70 + len(said)) // BLOCK_TOKENS * BLOCK_TOKENS
    text = "".join(chr(97 + token % 26) for token in said)
    answered = [*items, Item("message", "assistant", text)]
    assert key == prefix_keys(answered, request.release, "mine")[-1], "the key that the next turn will bring"


def test_a_conversation_that_cannot_be_rendered_again_is_logged_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet()
    fleet.answer(generate("a"))
    monkeypatch.setattr(FakeSpeech, "lay_out", lambda *_: 1 / 0)
    fleet.rest()
    assert [type(fault.error) for fault in fleet.engine.take_faults()] == [ZeroDivisionError]


def test_requests_that_arrive_together_read_what_they_share_once() -> None:
    fleet, text = Fleet(slots=4), SYSTEM + "shared"
    requests = [generate(f"s{index}", text + str(index), seed=index) for index in range(4)]
    outputs = fleet.answer(*requests)
    assert sorted(cached(outputs)) == [0, *[3 * BLOCK_TOKENS] * 3]
    for request in requests:
        heard = [row for row in outputs if isinstance(row, Row) and row.stream == request.stream]
        assert ids_of(heard) == said_alone(request, CONTEXT)


def test_cached_tokens_are_what_was_copied_not_what_was_there_when_it_got_its_slot() -> None:
    fleet = Fleet(blocks=3, slots=2)
    fleet.answer(generate("first", SYSTEM))
    before = len(fleet.runner.plans)
    outputs = fleet.answer(generate("other", "o" * 3 * BLOCK_TOKENS), generate("late", SYSTEM))
    assert not any(plan.loads for plan in fleet.runner.plans[before:]), "the other's blocks have put it out"
    assert cached(outputs) == [0, 0]


def test_what_is_re_read_does_not_put_out_what_is_newer() -> None:
    fleet = Fleet(blocks=10)
    talks = [generate(f"t{index}", chr(97 + index) * 4 * BLOCK_TOKENS, most=2) for index in range(5)]
    said = {talk.stream: ids_of(fleet.answer(talk)) for talk in talks}
    before = fleet.tokens_read()
    fleet.rest()
    assert fleet.tokens_read() - before <= 2 * 4 * BLOCK_TOKENS, "no more than fits is read"
    for talk in talks[-2:]:
        turn = next_turn(talk, said[talk.stream])
        turn = msgspec.structs.replace(turn, max_output_tokens=1)
        assert cached(fleet.answer(turn)) == [4 * BLOCK_TOKENS]


def test_a_conversation_that_has_gone_on_is_re_read_once_not_for_each_turn() -> None:
    fleet, request = Fleet(), generate("a", "u" * 100, most=40, seed=5)
    request = msgspec.structs.replace(request, prefix_keys=prefix_keys(request.items, request.release, ""))
    said = ids_of(fleet.answer(request))
    (answer,) = output_items(request.stream, request.release, said, deltas_of(fleet.outputs))
    items = [*request.items, answer, Item("message", "user", "more")]
    turn = msgspec.structs.replace(
        request, stream="b", items=items, prefix_keys=prefix_keys(items, request.release, "")
    )
    fleet.answer(turn)
    assert len(fleet.engine._pasts) == 1


def test_at_most_one_conversation_is_rendered_between_two_looks_at_who_came() -> None:
    rendered: list[int] = []

    class Counting(FakeSpeech):
        def lay_out(self, items: list[Item], release: str, setting: Setting = PLAIN) -> Rendered:
            rendered.append(len(items))
            return super().lay_out(items, release, setting)

    fleet = Fleet(speech=Counting())
    for index in range(3):
        fleet.answer(generate(f"short {index}", "too short for a block"))
    rendered.clear()
    for count in (1, 2, 3):
        assert fleet.step() is None and len(rendered) == count
        assert fleet.engine.resting == (count == 3)


def test_an_answer_that_cannot_be_remembered_ends_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, request = Fleet(), generate("a", most=4, seed=3)
    monkeypatch.setattr("edge_node.engine.engine.past_of", lambda answer: 1 / 0)
    outputs = fleet.answer(request)
    assert ids_of(outputs) == said_alone(request, CONTEXT) and isinstance(outputs[-1], Done)
    assert [type(fault.error) for fault in fleet.engine.take_faults()] == [ZeroDivisionError]
