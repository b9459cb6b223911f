from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec
import pytest

from core.conversation import Item
from core.frames import Done, Failed, Progress, Row, Started, Text, Usage
from edge_node.engine.engine import Engine, EngineLimits, Output
from edge_node.engine.speech import PLAIN, Rendered, Setting
from tests.fakes import STOP_ID, FakeParser, FakeRunner, FakeSpeech, fake_manifest, generate, said_alone

CONTEXT = 64


def engine_of(slots: int = 2, max_waiting: int = 8, max_stall_ms: float = 4.0) -> Engine:
    limits = EngineLimits(
        slots=slots, context_tokens=CONTEXT, max_waiting=max_waiting, chunk_tokens=16, max_stall_ms=max_stall_ms
    )
    return Engine(fake_manifest(), FakeSpeech(), limits)


def run_dry(engine: Engine, runner: FakeRunner) -> list[Output]:
    outputs: list[Output] = []
    while (plan := engine.plan(0.0)) is not None:
        outputs += engine.commit(plan, runner.run(plan), 0.0)
        engine.check_invariants()
    return outputs


def ids_of(outputs: Iterable[Output], stream: str = "s") -> list[int]:
    return [token for output in outputs if isinstance(output, Row) and output.stream == stream for token in output.ids]


def test_a_stream_starts_says_rows_in_order_and_ends_once() -> None:
    engine, request = engine_of(), generate(most=5)
    assert engine.submit(request, 0.0) == [Progress("s", 1, 0, 5)], "accepted at once"
    outputs = run_dry(engine, FakeRunner(2, CONTEXT))
    assert outputs[0] == Started("s", 1, input_tokens=5, cached_tokens=0)
    rows = [output for output in outputs if isinstance(output, Row)]
    assert [row.seq for row in rows] == list(range(len(rows)))
    assert ids_of(outputs) == said_alone(request, CONTEXT)
    assert isinstance(outputs[-1], Done)
    assert outputs[-1].usage == Usage(input_tokens=5, cached_tokens=0, output_tokens=len(rows))
    assert sum(isinstance(output, Done | Failed) for output in outputs) == 1


def test_a_long_prompt_reports_its_progress() -> None:
    engine = engine_of()
    engine.submit(generate(text="x" * 40), 0.0)
    outputs = run_dry(engine, FakeRunner(2, CONTEXT))
    progress = [output.computed for output in outputs if isinstance(output, Progress)]
    assert progress == [16, 32]


def test_chunks_shrink_while_others_write() -> None:
    engine, runner = engine_of(), FakeRunner(2, CONTEXT)
    engine.submit(generate("early", "ab", most=40, seed=3), 0.0)
    for _ in range(3):
        plan = engine.plan(0.0)
        assert plan is not None
        engine.commit(plan, runner.run(plan), 0.0)
    engine.submit(generate("late", "x" * 50), 0.0)
    run_dry(engine, runner)
    lengths = [len(plan.chunk.ids) for plan in runner.plans[3:] if plan.chunk and plan.decode]
    assert lengths and max(lengths) <= 4, "the fake costs 1 ms a token, and 4 ms are allowed"


@pytest.mark.parametrize("text", ["a", "ab", "abc", "x" * 17, "x" * 33, "x" * (CONTEXT - 1)])
def test_prompts_of_every_awkward_length_are_read_through_the_chunk_path(text: str) -> None:
    engine, request = engine_of(), generate(text=text)
    engine.submit(request, 0.0)
    assert ids_of(run_dry(engine, FakeRunner(2, CONTEXT))) == said_alone(request, CONTEXT)


@pytest.mark.parametrize("given", [1, 3, 6])
def test_a_stream_that_is_continued_says_exactly_the_rest(given: int) -> None:
    whole = said_alone(generate(most=8, seed=3), CONTEXT)
    assert len(whole) == 8
    engine = engine_of()
    engine.submit(generate(most=8, seed=3, epoch=2, output_ids=whole[:given]), 0.0)
    outputs = run_dry(engine, FakeRunner(2, CONTEXT))
    rows = [output for output in outputs if isinstance(output, Row)]
    assert rows[0].seq == given and ids_of(outputs) == whole[given:]
    said = [delta for row in rows for deltas in row.deltas for delta in deltas]
    assert all(isinstance(delta, Text) for delta in said), "the message was opened before the resume"
    assert isinstance(outputs[-1], Done) and outputs[-1].usage.output_tokens == 8


@pytest.mark.parametrize(("ids", "finish"), [([5, 6, STOP_ID], "stop"), ([5, 6, 7, 8], "length")])
def test_given_ids_that_already_end_the_answer_end_it_at_once(ids: list[int], finish: str) -> None:
    engine = engine_of()
    started, done = engine.submit(generate(most=4, output_ids=ids, epoch=3), 0.0)
    assert isinstance(started, Started) and started.epoch == 3
    assert isinstance(done, Done) and (done.finish, done.usage.output_tokens) == (finish, len(ids))
    assert engine.plan(0.0) is None


def test_the_context_bounds_the_answer() -> None:
    engine, request = engine_of(), generate(text="x" * (CONTEXT - 3), most=100, seed=3)
    engine.submit(request, 0.0)
    outputs = run_dry(engine, FakeRunner(2, CONTEXT))
    assert len(ids_of(outputs)) == 3 and isinstance(outputs[-1], Done) and outputs[-1].finish == "length"


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers() -> None:
    (failed,) = engine_of().submit(generate(text="x" * CONTEXT), 0.0)
    assert isinstance(failed, Failed)
    assert (failed.code, failed.have, failed.most) == ("context_length_exceeded", CONTEXT, CONTEXT)
    assert failed.message == "The conversation has 64 tokens, the model's context holds 64; shorten it."


def test_truncation_auto_drops_the_oldest_rounds_and_says_how_many_items() -> None:
    items = [Item("message", "system", "s" * 4)]
    items += [Item("message", role, role[0] * 20) for role in ("user", "assistant", "user", "assistant", "user")]
    engine = engine_of()
    assert engine.submit(generate(items=items, truncation="auto", most=4), 0.0) == [Progress("s", 1, 0, 24)]
    started = run_dry(engine, FakeRunner(2, CONTEXT))[0]
    assert started == Started("s", 1, input_tokens=24, cached_tokens=0, dropped_items=4)


def test_a_continued_response_keeps_the_cut_that_it_began_with() -> None:
    items = [Item("message", role, role[0] * 10) for role in ("user", "assistant", "user")]
    engine = engine_of()
    engine.submit(generate(items=items, truncation="auto", dropped_items=2, output_ids=[5], epoch=2), 0.0)
    started = run_dry(engine, FakeRunner(2, CONTEXT))[0]
    assert started == Started("s", 2, input_tokens=10, cached_tokens=0, dropped_items=2)


def test_a_full_waiting_line_refuses_and_loses_nothing_already_accepted() -> None:
    engine = engine_of(slots=1, max_waiting=1)
    assert [engine.submit(generate(name), 0.0) for name in "ab"] == [[Progress(name, 1, 0, 5)] for name in "ab"]
    (failed,) = engine.submit(generate("c"), 0.0)
    assert isinstance(failed, Failed) and (failed.code, failed.retryable) == ("overloaded", True)
    outputs = run_dry(engine, FakeRunner(1, CONTEXT))
    assert {output.stream for output in outputs if isinstance(output, Done)} == {"a", "b"}


def test_a_higher_epoch_replaces_and_equal_or_lower_ones_are_dropped() -> None:
    engine, runner, request = engine_of(slots=1), FakeRunner(1, CONTEXT), generate("s", "second", epoch=5)
    engine.submit(generate("s", "first", epoch=4), 0.0)
    plan = engine.plan(0.0)
    assert plan is not None
    assert engine.submit(request, 0.0) == [Progress("s", 5, 0, 6)]
    assert engine.submit(generate("s", "third", epoch=5), 0.0) == []
    assert engine.submit(generate("s", "fourth", epoch=3), 0.0) == []
    assert engine.commit(plan, runner.run(plan), 0.0) == [], "the step was for an epoch that is dead"
    outputs = run_dry(engine, runner)
    assert ids_of(outputs) == said_alone(request, CONTEXT)
    assert {output.epoch for output in outputs} == {5}


def test_what_was_cancelled_while_its_step_ran_says_nothing_more() -> None:
    engine, runner = engine_of(slots=1), FakeRunner(1, CONTEXT)
    engine.submit(generate(), 0.0)
    plan = engine.plan(0.0)
    assert plan is not None
    (done,) = engine.cancel("s", 1, 0.0)
    assert isinstance(done, Done) and done.finish == "cancelled"
    request = generate("next", "other")
    engine.submit(request, 0.0)
    assert engine.commit(plan, runner.run(plan), 0.0) == []
    assert ids_of(run_dry(engine, runner), "next") == said_alone(request, CONTEXT)


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("given", [(), range(5, 25)])
def test_after_a_cancel_at_most_the_step_under_way_is_computed_of_a_stream(given: Iterable[int], steps: int) -> None:
    """While its prompt or its given ids are read, and while it writes."""
    limits = EngineLimits(slots=1, context_tokens=CONTEXT, max_waiting=1, chunk_tokens=8, failover_exact_s=0.0)
    engine, runner = Engine(fake_manifest(), FakeSpeech(), limits), FakeRunner(1, CONTEXT)
    engine.submit(generate(text="x" * 30, most=30, output_ids=list(given), seed=3), 0.0)
    for _ in range(steps):
        plan = engine.plan(0.0)
        assert plan is not None
        engine.commit(plan, runner.run(plan), 0.0)
    under_way = engine.plan(0.0)
    assert under_way is not None
    (done,) = engine.cancel("s", 1, 0.0)
    assert isinstance(done, Done) and done.finish == "cancelled"
    assert engine.commit(under_way, runner.run(under_way), 0.0) == []
    assert engine.plan(0.0) is None and engine.resting


def test_cancelling_an_older_epoch_or_an_unknown_stream_does_nothing() -> None:
    engine = engine_of()
    engine.submit(generate(epoch=2), 0.0)
    assert engine.cancel("s", 1, 0.0) == [] and engine.cancel("t", 1, 0.0) == []
    assert engine.waiting == 1


def test_a_release_that_is_not_here_may_be_tried_elsewhere() -> None:
    engine = Engine(
        fake_manifest("other@000000000000"), FakeSpeech(), EngineLimits(slots=1, context_tokens=8, max_waiting=0)
    )
    (failed,) = engine.submit(generate(), 0.0)
    assert isinstance(failed, Failed) and (failed.code, failed.retryable) == ("model_not_found", True)


def test_a_conversation_that_cannot_be_rendered_fails_with_one_sentence_and_is_handed_to_the_log() -> None:
    engine = engine_of()
    (failed,) = engine.submit(generate(text="boom!"), 0.0)
    assert failed == Failed("s", 1, "server_error", False, "This conversation cannot be rendered.")
    assert [type(fault.error).__name__ for fault in engine.take_faults()] == ["SpeechError"]
    assert engine.take_faults() == []


def test_a_fault_in_one_sequence_ends_that_one_only(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = generate("good", "one", seed=3), generate("bad", "two", seed=5)
    only_bad = set(said_alone(bad, CONTEXT)[:-1]) - set(said_alone(good, CONTEXT))
    monkeypatch.setattr(FakeParser, "breaks_on", min(only_bad))
    engine = engine_of()
    engine.submit(good, 0.0)
    engine.submit(bad, 0.0)
    outputs = run_dry(engine, FakeRunner(2, CONTEXT))
    assert ids_of(outputs, "good") == said_alone(good, CONTEXT)
    (failed,) = [output for output in outputs if isinstance(output, Failed)]
    assert (failed.stream, failed.code, failed.retryable) == ("bad", "server_error", False)
    assert [(fault.stream, type(fault.error)) for fault in engine.take_faults()] == [("bad", ZeroDivisionError)]


def test_ids_that_the_release_does_not_know_are_refused() -> None:
    (failed,) = engine_of().submit(generate(output_ids=[4_000_000]), 0.0)
    assert isinstance(failed, Failed) and failed.code == "server_error"


def test_timings_say_how_long_it_waited_read_and_wrote() -> None:
    engine, runner = engine_of(slots=1), FakeRunner(1, CONTEXT)
    engine.submit(generate(most=2, seed=3), 1.0)
    outputs: list[Output] = []
    for planned_s, committed_s in ((1.5, 2.0), (2.0, 4.0)):
        plan = engine.plan(planned_s)
        assert plan is not None
        outputs = engine.commit(plan, runner.run(plan), committed_s)
    done = outputs[-1]
    assert isinstance(done, Done)
    assert (done.timings.queue_ms, done.timings.prefill_ms, done.timings.decode_ms) == (500.0, 500.0, 2000.0)


def test_rates_are_unknown_at_first_and_measured_later() -> None:
    engine = engine_of()
    assert (engine.rates.prefill_tokens_s, engine.rates.decode_tokens_s) == (0.0, 0.0)
    engine.submit(generate(seed=3), 0.0)
    run_dry(engine, FakeRunner(2, CONTEXT))
    assert engine.rates.prefill_tokens_s == pytest.approx(1000)
    assert engine.rates.decode_tokens_s == pytest.approx(1 / 0.011)


def test_a_plan_must_be_committed_before_the_next() -> None:
    engine = engine_of()
    engine.submit(generate(), 0.0)
    engine.plan(0.0)
    with pytest.raises(RuntimeError, match="not been committed"):
        engine.plan(0.0)


def test_a_format_that_cannot_be_kept_is_refused() -> None:
    request = msgspec.structs.replace(generate(), format={"type": "json_schema"})
    (failed,) = engine_of().submit(request, 0.0)
    assert isinstance(failed, Failed) and failed.code == "unsupported_parameter"


@pytest.mark.parametrize("truncation", ["disabled", "auto"])
def test_a_conversation_far_too_long_is_refused_without_being_read(truncation: Literal["auto", "disabled"]) -> None:
    class Unreading(FakeSpeech):
        def lay_out(self, items: list[Item], release: str, setting: Setting = PLAIN) -> Rendered:
            raise AssertionError("this would take long")

    limits = EngineLimits(slots=1, context_tokens=CONTEXT, max_waiting=1)
    engine = Engine(fake_manifest(), Unreading(), limits)
    (failed,) = engine.submit(generate(text="x" * 2 * CONTEXT, truncation=truncation), 0.0)
    assert isinstance(failed, Failed)
    assert (failed.code, failed.have, failed.most) == ("context_length_exceeded", CONTEXT, CONTEXT)


def test_a_conversation_that_renders_to_nothing_ends_alone() -> None:
    engine = engine_of()
    (failed,) = engine.submit(generate(text=""), 0.0)
    assert isinstance(failed, Failed) and failed.code == "server_error"
    assert run_dry(engine, FakeRunner(2, CONTEXT)) == []
