"""Answers that were begun elsewhere: how given ids are computed, and that what follows is what would have been said."""

from __future__ import annotations

import json
from functools import cache

import msgspec
import pytest

from core.frames import Delta, Done, Generate, Progress, Row, Sampling, Started
from edge_node.engine.engine import EngineLimits
from edge_node.engine.grammar import Grammars
from edge_node.engine.speech.detokeniser import byte_table
from edge_node.engine.step import BLOCK_TOKENS, StepPlan, StepResult
from tests.edge_node.engine.scripted import Node, Runner, Scripted
from tests.edge_node.engine.speech.harmony_speeches import joined
from tests.edge_node.engine.speech.harmony_speeches import tiny as tiny_harmony
from tests.edge_node.engine.speech.tiny_tokenizer import END, ids_of_bytes, tiny_manifest, tiny_speech, tokenizer_json
from tests.fakes import STOP_ID, FakeRunner, fake_manifest, generate, said_alone

CONTEXT = 256
BLOCKS = 8
EXACTLY, FAST = float("inf"), 0.0


def endless(stream: str = "s", text: str = "hello", *, most: int, priority: int = 0, exact: bool = False) -> Generate:
    """A request whose answer ends at its length and not before."""
    request = generate(stream, text, most=most, priority=priority, exact=exact)
    return msgspec.structs.replace(request, sampling=Sampling(1.0, logit_bias=[(STOP_ID, -1000.0)]))


def limits_of(exact_s: float, *, slots: int = 1, blocks: int = 0) -> EngineLimits:
    return EngineLimits(
        slots=slots,
        context_tokens=CONTEXT,
        max_waiting=4,
        chunk_tokens=16,
        prefix_blocks=blocks,
        failover_exact_s=exact_s,
    )


def node_of(exact_s: float, *, slots: int = 1, blocks: int = 0, paths_differ: bool = True) -> Node:
    runner = FakeRunner(slots, CONTEXT, blocks, paths_differ)
    return Node(limits_of(exact_s, slots=slots, blocks=blocks), runner)


def continued(request: Generate, given: list[int]) -> Generate:
    return msgspec.structs.replace(request, epoch=request.epoch + 1, output_ids=given)


def read_positions(node: Node) -> list[int]:
    """Positions that went through the chunk path, in order; padding left out."""
    return [chunk.start + at for chunk in (p.chunk for p in node.plans) if chunk for at in range(len(chunk.ids))]


def stepped_positions(node: Node) -> list[int]:
    """Positions of the only sequence that went through the one-token path."""
    return [decode.ends[0] - 1 for decode in (plan.decode for plan in node.plans) if decode]


# -- which path -------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, 20))
def test_an_exact_continuation_computes_given_ids_one_by_one_and_says_what_the_whole_answer_said(cut: int) -> None:
    request = endless(text="x" * 32, most=20)
    whole = said_alone(request, CONTEXT)
    assert len(whole) == 20
    node = node_of(EXACTLY)
    node.answer(continued(request, whole[:cut]))
    assert node.ids() == whole[cut:]
    assert read_positions(node) == list(range(32))
    assert stepped_positions(node) == list(range(32, 32 + 19))


@pytest.mark.parametrize("cut", [16, 32])
def test_a_fast_continuation_reads_given_ids_in_chunks_each_position_once(cut: int) -> None:
    request = endless(text="x" * 32, most=40)
    given = said_alone(request, CONTEXT)[:cut]
    node = node_of(FAST)
    node.answer(continued(request, given))
    whole = [*given, *node.ids()]
    assert whole == said_alone(continued(request, given), CONTEXT, given_read=True)
    assert read_positions(node) == list(range(32 + cut))
    assert stepped_positions(node) == list(range(32 + cut, 32 + len(whole) - 1))
    rows = [output for output in node.outputs if isinstance(output, Row)]
    assert [row.seq for row in rows] == list(range(cut, len(whole)))


@pytest.mark.parametrize("cut", range(1, 20))
def test_wherever_it_was_cut_a_fast_continuation_says_what_reading_everything_leads_to(cut: int) -> None:
    request = endless(text="x" * 30, most=40)
    again = continued(request, said_alone(request, CONTEXT)[:cut])
    node = node_of(FAST)
    node.answer(again)
    assert [*again.output_ids, *node.ids()] == said_alone(again, CONTEXT, given_read=True)


def test_whoever_asks_for_exactness_is_continued_exactly_whatever_it_takes() -> None:
    request = endless(most=40, exact=True)
    whole = said_alone(request, CONTEXT)
    node = node_of(FAST)
    node.answer(continued(request, whole[:30]))
    assert node.ids() == whole[30:]
    assert read_positions(node) == list(range(8)), "five ids, padded"


def test_an_answer_that_is_not_begun_yet_is_no_continuation() -> None:
    node = node_of(FAST)
    node.answer(endless(most=4))
    assert node.ids() == said_alone(endless(most=4), CONTEXT)


class SlowSteps(FakeRunner):
    """A decode step takes 0.1 s for each row."""

    def run(self, plan: StepPlan) -> StepResult:
        result = super().run(plan)
        rows = 0 if plan.decode is None else len(plan.decode.ids)
        return StepResult(result.chunk_logits, result.decode_logits, 0.001, 0.1 * rows)


@pytest.mark.parametrize(("given", "others", "is_read"), [(9, 0, False), (10, 0, True), (4, 1, False), (5, 1, True)])
def test_what_would_take_too_long_one_by_one_at_the_width_to_be_expected_is_read(
    given: int, others: int, is_read: bool
) -> None:
    node = Node(limits_of(1.0, slots=3), SlowSteps(3, CONTEXT))
    node.answer(endless("first", most=3), endless("second", most=3))
    node.submit(*[endless("other", most=60)][:others])
    for _ in range(3 * others):
        node.step()
    request = endless(most=20)
    before = len(node.plans)
    node.answer(continued(request, said_alone(request, CONTEXT)[:given]))
    read = {chunk.start + len(chunk.ids) for chunk in (plan.chunk for plan in node.plans[before:]) if chunk}
    assert (max(read) > 8) == is_read, "five ids of prompt are read as eight"


# -- what is kept -----------------------------------------------------------------------------


def test_what_was_read_of_an_answer_is_kept_and_serves_whoever_continues_it_again() -> None:
    request = endless(text="x" * 40, most=200)
    node = node_of(FAST, blocks=BLOCKS)
    again = continued(request, said_alone(request, CONTEXT)[:100])
    node.submit(again)
    while not node.ids():
        node.step()
    said = node.ids()
    last = continued(again, [*again.output_ids, *said])
    before = len(node.plans)
    node.answer(last)
    loads = [len(load.blocks) for plan in node.plans[before:] for load in plan.loads]
    assert loads == [2], "140 ids have two whole blocks"
    started = [output for output in node.outputs if isinstance(output, Started)][-1]
    done = node.ended()
    assert isinstance(done, Done)
    assert started.cached_tokens == done.usage.cached_tokens == 40, "cached tokens are those of the prompt"
    assert [*again.output_ids, *node.ids()] == said_alone(last, CONTEXT, given_read=True)


def test_a_kept_block_of_an_answer_is_the_one_of_a_prompt_with_the_same_ids() -> None:
    request = endless(text="x" * 40, most=200)
    given = said_alone(request, CONTEXT)[:100]
    node = node_of(FAST, blocks=BLOCKS)
    node.answer(continued(request, given))
    answer = msgspec.structs.replace(request.items[0], role="assistant", ids=given)
    follower = generate("follower", items=[*request.items, answer])
    node.answer(follower)
    assert node.started("follower").cached_tokens == 2 * BLOCK_TOKENS
    assert node.ids("follower") == said_alone(follower, CONTEXT)


def test_what_was_read_of_one_tenants_answer_serves_no_other() -> None:
    request = endless(text="x" * 40, most=110)
    again = continued(request, said_alone(request, CONTEXT)[:100])
    node = node_of(FAST, blocks=BLOCKS)
    for salt in ("one", "another", "one"):
        node.answer(msgspec.structs.replace(again, stream=f"{salt} {len(node.plans)}", cache_salt=salt))
    cached = [output.cached_tokens for output in node.outputs if isinstance(output, Started)]
    assert cached == [0, 0, 40]


@pytest.mark.parametrize("steps", range(1, 14))
def test_one_that_gives_way_while_its_given_ids_are_read_or_later_goes_on_unchanged(steps: int) -> None:
    request = endless("low", text="x" * 30, most=90)
    again = continued(request, said_alone(request, CONTEXT)[:60])
    node = node_of(FAST)
    node.submit(again)
    for _ in range(steps):
        node.step()
    node.answer(generate("high", most=4, priority=1))
    assert [*again.output_ids, *node.ids("low")] == said_alone(again, CONTEXT, given_read=True)


@pytest.mark.parametrize("exact_s", [EXACTLY, FAST])
def test_progress_counts_the_prompt_and_usage_tells_prompt_from_output(exact_s: float) -> None:
    request = endless(text="x" * 40, most=70)
    given = said_alone(request, CONTEXT)[:50]
    node = node_of(exact_s)
    node.answer(continued(request, given))
    progress = [output for output in node.outputs if isinstance(output, Progress)]
    assert {output.total for output in progress} == {40}
    assert [output.computed for output in progress][:3] == [0, 16, 32]
    assert all(output.computed <= 40 for output in progress)
    done = node.ended()
    assert isinstance(done, Done)
    assert (done.usage.input_tokens, done.usage.output_tokens) == (40, 50 + len(node.ids()))
    assert node.started().input_tokens == 40


@pytest.mark.parametrize("exact_s", [EXACTLY, FAST])
def test_penalties_and_log_probabilities_of_a_continued_answer_are_those_of_the_whole_one(exact_s: float) -> None:
    """On a model whose paths give the same numbers, where nothing may differ."""
    sampling = Sampling(
        1.0,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        logit_bias=[(STOP_ID, -1000.0)],
        top_logprobs=2,
    )
    request = msgspec.structs.replace(endless(text="x" * 20, most=12), sampling=sampling)
    node = node_of(exact_s, paths_differ=False)
    node.answer(request)
    ids, said = node.ids(), deltas_of(node)
    assert len(ids) == 12
    for cut in range(1, len(ids)):
        rest = node_of(exact_s, paths_differ=False)
        rest.answer(continued(request, ids[:cut]))
        assert (rest.ids(), deltas_of(rest)) == (ids[cut:], said[cut:]), cut


# -- what is said: at every cut, exactly what the whole answer says from there on ----------------


def deltas_of(node: Node) -> list[list[Delta]]:
    rows = [output for output in node.outputs if isinstance(output, Row)]
    return [deltas for row in rows for deltas in row.deltas]


def harmony(runner: Runner, exact_s: float) -> Node:
    manifest = msgspec.structs.replace(fake_manifest("gpt-oss@000000000000"), tokenizer_size=512, vocab_size=512)
    limits = msgspec.structs.replace(limits_of(exact_s), context_tokens=2048, chunk_tokens=256)
    return Node(limits, runner, tiny_harmony().speech, manifest=manifest)


THOUGHT = "<|channel|>analysis<|message|>Which place? Zürich 🏞️, 三条河.<|end|>"
CALL = (
    '<|start|>assistant<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"place": "Zürich 🏞️",'
    ' "days": [1, 2]}<|call|>'
)
ANSWER = "<|start|>assistant<|channel|>final<|message|>In 三条河 🏞️ it rains. STO, not STOP.<|return|>"


@pytest.mark.parametrize("exact_s", [EXACTLY, FAST])
@pytest.mark.parametrize(
    ("script", "stop"),
    [(THOUGHT + CALL, ()), (THOUGHT + ANSWER, ()), (THOUGHT + ANSWER, ("STOP", "rains!"))],
    ids=["a call", "an answer", "a stop string that seems to begin twice"],
)
def test_wherever_gpt_oss_was_cut_it_goes_on_with_exactly_what_it_would_have_said(
    script: str, stop: tuple[str, ...], exact_s: float
) -> None:
    ids = tiny_harmony().ids(script)
    request = generate(text="Weather?", most=400, stop=stop)
    request = msgspec.structs.replace(request, release="gpt-oss@000000000000", sampling=Sampling(0.0, top_logprobs=1))
    prompt_tokens = len(tiny_harmony().speech.lay_out(request.items, request.release).ids)
    whole = harmony(Scripted(ids, prompt_tokens, 512), exact_s)
    whole.answer(request)
    said = deltas_of(whole)
    assert {kind for kind, _, _, _ in joined(said)} > {"reasoning"}
    assert any(not deltas for deltas in said), "some ids say nothing yet"
    for cut in range(1, len(whole.ids())):
        rest = harmony(Scripted(ids, prompt_tokens, 512), exact_s)
        rest.answer(continued(request, whole.ids()[:cut]))
        assert rest.ids() == whole.ids()[cut:], cut
        assert deltas_of(rest) == said[cut:], cut
        ended, as_whole = rest.ended(), whole.ended()
        assert isinstance(ended, Done) and isinstance(as_whole, Done)
        assert (ended.finish, ended.usage) == (as_whole.finish, as_whole.usage)


@pytest.mark.parametrize("exact_s", [EXACTLY, FAST])
@pytest.mark.parametrize("stop", [(), ("river!",), ("河流", "🏞️?")])
def test_wherever_plain_text_was_cut_it_goes_on_with_whole_characters_and_its_stop_strings(
    stop: tuple[str, ...], exact_s: float
) -> None:
    ids = [*ids_of_bytes("A rive riv river! 三条河, 🏞️ 河流 end".encode()), END]
    manifest = msgspec.structs.replace(tiny_manifest(), tokenizer_size=262, vocab_size=262)
    request = generate(most=200, stop=stop)
    request = msgspec.structs.replace(request, release=manifest.release, sampling=Sampling(0.0))
    prompt_tokens = len(tiny_speech().lay_out(request.items, request.release).ids)

    def said(given: list[int]) -> tuple[list[int], list[list[Delta]]]:
        node = Node(limits_of(exact_s), Scripted(ids, prompt_tokens, 262), tiny_speech(), manifest=manifest)
        node.answer(continued(request, given))
        return node.ids(), deltas_of(node)

    whole, deltas = said([])
    assert any(not one for one in deltas[:-1])
    for cut in range(1, len(whole)):
        assert said(whole[:cut]) == (whole[cut:], deltas[cut:]), cut


FORM = {
    "type": "json_schema",
    "name": "form",
    "schema": {
        "type": "object",
        "properties": {"who": {"enum": ["Ada", "Bob", "Zoë"]}, "sure": {"type": "boolean"}},
        "required": ["who", "sure"],
        "additionalProperties": False,
    },
}


@cache
def grammars() -> Grammars:
    return Grammars(byte_table(json.loads(tokenizer_json())), 262, frozenset({END}))


@pytest.mark.parametrize("exact_s", [EXACTLY, FAST])
def test_wherever_a_form_was_cut_it_is_filled_in_as_it_would_have_been(exact_s: float) -> None:
    manifest = msgspec.structs.replace(tiny_manifest(), tokenizer_size=262, vocab_size=262)

    def said(given: list[int]) -> tuple[list[int], list[list[Delta]]]:
        node = Node(limits_of(exact_s), Scripted([], 0, 262), tiny_speech(), grammars(), manifest)
        request = generate(output_ids=given, most=100)
        node.answer(msgspec.structs.replace(request, release=manifest.release, sampling=Sampling(1.0), format=FORM))
        assert isinstance(node.ended(), Done)
        return node.ids(), deltas_of(node)

    whole, deltas = said([])
    assert whole[-1] == END and len(whole) > 20
    for cut in range(1, len(whole)):
        assert said(whole[:cut]) == (whole[cut:], deltas[cut:]), cut
