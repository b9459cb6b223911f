"""The engine on the real small model: nothing that happens around a stream shows in it, bit for bit."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import onnxruntime
import pytest

from core.conversation import Item
from core.errors import ConfigError
from core.frames import Done, Generate, Progress, Row, Sampling, Started, Text
from core.manifest import Manifest
from edge_node.engine.engine import Engine, EngineLimits
from edge_node.engine.speech import Speech
from edge_node.engine.step import Logits, StepPlan, StepResult, StepRunner
from edge_node.runtime.runner import DeviceUnavailable, Runner
from tests.tools.samples import watch_samples

SLOTS = 8
CONTEXT = 256
BLOCKS = 12
NEW_TOKENS = 8
GREEDY = Sampling(0.0)
SAMPLED = Sampling(0.9, 0.95, 50)
TOPICS = ("Hi", "Name three rivers.", "三条河流是什么？ 🏞️", "Count: " + "one two three " * 12)


@pytest.fixture(scope="module")
def opened(smollm2_release: Path, manifest: Manifest) -> tuple[Runner, list[tuple[StepPlan, StepResult]]]:
    """A runner, and what its warm-up measured."""
    runner = Runner.open(smollm2_release, manifest, "cpu", 1, SLOTS, CONTEXT, prefix_blocks=BLOCKS)
    return runner, runner.warm_up(speculation=True)


@pytest.fixture(scope="module")
def runner(opened: tuple[Runner, list[tuple[StepPlan, StepResult]]]) -> Runner:
    """Shared on purpose: its slots and blocks are full of what earlier tests left there."""
    return opened[0]


@pytest.fixture
def bits(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], str]:
    """(seed, position) -> digest of the logits that were sampled from."""
    seen: dict[tuple[int, int], str] = {}

    def note(logits: Logits, seed: int, position: int) -> None:
        seen[seed, position] = hashlib.sha256(logits.tobytes()).hexdigest()

    watch_samples(monkeypatch, note)
    return seen


def request(manifest: Manifest, number: int, output_ids: list[int] | None = None, most: int = NEW_TOKENS) -> Generate:
    """Eight different ones: prompt lengths from 30 to 120 tokens, half of them greedy."""
    items = [Item("message", "user", TOPICS[number % 4] + " please" * (number // 4))]
    sampling = SAMPLED if number % 2 else GREEDY
    return Generate(f"s{number}", 1, manifest.release, items, output_ids or [], number, sampling, [], most)


class Watched:
    """A runner that remembers what it was asked for."""

    def __init__(self, runner: StepRunner) -> None:
        self.plans: list[StepPlan] = []
        self._runner = runner

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        return self._runner.run(plan)


class Said:
    """What one stream was told."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.texts: list[str] = []
        self.cached_tokens: list[int] = []


def open_engine(manifest: Manifest, speech: Speech, **limits: Any) -> Engine:
    bounds: dict[str, Any] = {"slots": SLOTS, "context_tokens": CONTEXT, "max_waiting": 8} | limits
    return Engine(manifest, speech, EngineLimits(**bounds))


def say(
    runner: StepRunner, manifest: Manifest, speech: Speech, requests: list[Generate], apart: int = 0, **limits: Any
) -> dict[str, Said]:
    """Run the requests to their end in an engine of their own."""
    return converse(open_engine(manifest, speech, **limits), runner, requests, apart)


def converse(engine: Engine, runner: StepRunner, requests: list[Generate], apart: int = 0) -> dict[str, Said]:
    """Run the requests to their end; `apart` steps lie between one arrival and the next."""
    said = {request.stream: Said() for request in requests}
    coming, step, done = list(requests), 0, 0
    while coming or engine.running or engine.waiting:
        while coming and step >= apart * (len(requests) - len(coming)):
            (accepted,) = engine.submit(coming.pop(0), 0.0)
            assert isinstance(accepted, Progress)
        plan = engine.plan(0.0)
        outputs = [] if plan is None else engine.commit(plan, runner.run(plan), 0.0)
        engine.check_invariants()
        for output in outputs:
            if isinstance(output, Row):
                heard = said[output.stream]
                heard.ids += output.ids
                heard.texts += ["".join(d.text for d in deltas if isinstance(d, Text)) for deltas in output.deltas]
                heard.text = "".join(heard.texts)
            elif isinstance(output, Started):
                said[output.stream].cached_tokens.append(output.cached_tokens)
            done += isinstance(output, Done)
        step += 1
    assert done == len(requests) and engine.take_faults() == []
    return said


def rest(engine: Engine, runner: StepRunner) -> None:
    """Nobody asks: the engine does what it does then."""
    while not engine.resting:
        if (plan := engine.plan(0.0)) is None:
            continue
        assert engine.commit(plan, runner.run(plan), 0.0) == []
        engine.check_invariants()


def test_eight_chats_at_once_give_bit_for_bit_what_each_gives_alone(
    runner: Runner, manifest: Manifest, speech: Speech, bits: dict[tuple[int, int], str]
) -> None:
    requests = [request(manifest, number) for number in range(8)]
    alone: dict[str, Said] = {}
    for one in requests:
        alone |= say(runner, manifest, speech, [one])
    bits_alone = dict(bits)
    for apart, chunk_tokens in ((0, 256), (3, 16)):
        bits.clear()
        together = say(runner, manifest, speech, requests, apart=apart, chunk_tokens=chunk_tokens)
        assert bits == bits_alone
        for stream, heard in together.items():
            assert (heard.ids, heard.texts) == (alone[stream].ids, alone[stream].texts)
    assert len({heard.text for heard in alone.values()}) > 4 and len(bits_alone) > 8 * 4


@pytest.mark.parametrize("chunk_tokens", [2, 7, 24, 64])
def test_chunk_lengths_and_padding_change_no_bit(
    runner: Runner, manifest: Manifest, speech: Speech, bits: dict[tuple[int, int], str], chunk_tokens: int
) -> None:
    prompt = speech.lay_out(request(manifest, 0).items, manifest.release).ids
    assert len(prompt) < 48, "one chunk of 48 is padded"
    one = request(manifest, 0, most=3)
    say(runner, manifest, speech, [one])
    padded = dict(bits)
    bits.clear()
    say(runner, manifest, speech, [one], chunk_tokens=chunk_tokens)
    assert bits == padded and len(bits) == 3


@pytest.mark.parametrize("number", [2, 3])
def test_a_continued_answer_is_the_uninterrupted_one(
    runner: Runner, manifest: Manifest, speech: Speech, bits: dict[tuple[int, int], str], number: int
) -> None:
    whole = say(runner, manifest, speech, [request(manifest, number)])[f"s{number}"]
    bits_whole = dict(bits)
    for given in (1, len(whole.ids) // 2, len(whole.ids) - 1):
        bits.clear()
        again = request(manifest, number, output_ids=whole.ids[:given])
        rest = say(runner, manifest, speech, [again])[again.stream]
        assert (rest.ids, rest.texts) == (whole.ids[given:], whole.texts[given:])
        assert bits == {key: digest for key, digest in bits_whole.items() if key[1] >= given}


def test_an_answer_that_is_cut_inside_a_character_goes_on_with_the_whole_character(
    runner: Runner, manifest: Manifest, speech: Speech
) -> None:
    # Hot enough to say rare characters, whose bytes are spread over several ids.
    hot = Sampling(2.0, 1.0, 4000)
    for seed in range(4, 10):
        items = [Item("message", "user", "三条河流")]
        one = Generate("hot", 1, manifest.release, items, [], seed, hot, [], 24)
        whole = say(runner, manifest, speech, [one])["hot"]
        inside = [at for at, text in enumerate(whole.texts[:-1]) if not text and any(whole.texts[at + 1 :])]
        if inside:
            break
    cut = inside[0] + 1
    again = Generate(
        "hot", 2, one.release, one.items, whole.ids[:cut], one.seed, one.sampling, [], one.max_output_tokens
    )
    rest = say(runner, manifest, speech, [again])["hot"]
    assert (rest.ids, rest.texts) == (whole.ids[cut:], whole.texts[cut:])


def test_one_thread_and_two_give_the_same_bits(
    smollm2_release: Path,
    runner: Runner,
    manifest: Manifest,
    speech: Speech,
    bits: dict[tuple[int, int], str],
) -> None:
    requests = [request(manifest, number, most=4) for number in (1, 2)]
    say(runner, manifest, speech, requests)
    one_thread = dict(bits)
    bits.clear()
    fresh = Runner.open(smollm2_release, manifest, "cpu", 2, SLOTS, CONTEXT)
    say(fresh, manifest, speech, requests)
    assert bits == one_thread and len(bits) == 8


@pytest.mark.parametrize("rested", [False, True])
def test_the_next_turn_of_a_cached_conversation_is_the_one_of_a_new_engine(
    runner: Runner, manifest: Manifest, speech: Speech, bits: dict[tuple[int, int], str], rested: bool
) -> None:
    engine = open_engine(manifest, speech, prefix_blocks=BLOCKS)
    first = request(manifest, 7, most=24)
    heard = converse(engine, runner, [first])[first.stream]
    if rested:
        rest(engine, runner)
    stranger = [Item("message", "user", "Tell me about the sea. " * 20)]
    converse(engine, runner, [msgspec.structs.replace(first, stream="stranger", items=stranger)])  # takes its slot
    answer = Item("message", "assistant", heard.text, heard.ids, manifest.release)
    items = [*first.items, answer, Item("message", "user", "And three more words, please.")]
    second = msgspec.structs.replace(first, stream="second", items=items, seed=70)
    bits.clear()
    cached = converse(engine, runner, [second])["second"]
    with_cache = dict(bits)
    bits.clear()
    anew = say(runner, manifest, speech, [second])["second"]
    assert (cached.cached_tokens[0] >= 64, anew.cached_tokens) == (True, [0])
    assert with_cache == bits and len(bits) == len(anew.ids)
    assert (cached.ids, cached.texts) == (anew.ids, anew.texts)


def test_an_answer_that_had_to_give_way_is_the_one_that_was_left_alone(
    runner: Runner, manifest: Manifest, speech: Speech, bits: dict[tuple[int, int], str]
) -> None:
    patient = [request(manifest, number, most=12) for number in (0, 1)]
    hurried = [msgspec.structs.replace(request(manifest, number), priority=1) for number in (2, 3)]
    alone: dict[str, Said] = {}
    for one in (*patient, *hurried):
        alone |= say(runner, manifest, speech, [one])
    bits_alone = dict(bits)
    bits.clear()
    watched = Watched(runner)
    together = say(watched, manifest, speech, [*patient, *hurried], apart=3, slots=2)
    begun = [plan.chunk for plan in watched.plans if plan.chunk is not None and plan.chunk.start == 0]
    assert len(begun) > len(together), "nobody had to begin again"
    assert bits == bits_alone
    assert {stream: heard.ids for stream, heard in together.items()} == {s: heard.ids for s, heard in alone.items()}


@pytest.mark.parametrize("schedule", range(4))
def test_whatever_the_schedule_each_answer_is_the_one_it_gives_alone(
    runner: Runner, manifest: Manifest, speech: Speech, bits: dict[tuple[int, int], str], schedule: int
) -> None:
    """Batched, chunked, cached with a store too small for all, moved and preempted: all at once."""
    chance = random.Random(schedule)
    requests = [
        msgspec.structs.replace(request(manifest, number), priority=chance.randrange(3), exact=True)
        for number in chance.sample(range(8), 6)
    ]
    for one in requests:
        say(runner, manifest, speech, [one])
    bits_alone = dict(bits)
    engine = open_engine(
        manifest,
        speech,
        slots=chance.choice([2, 3, 5]),
        chunk_tokens=chance.choice([16, 48, 256]),
        prefix_blocks=chance.choice([3, 6, BLOCKS]),
        speculation=True,
    )
    watched = Watched(runner)
    for again in range(2):
        bits.clear()
        streams = [msgspec.structs.replace(one, stream=f"{one.stream}-{again}") for one in requests]
        converse(engine, watched, streams, apart=chance.randrange(5))
        assert bits == bits_alone
        if chance.random() < 0.5:
            rest(engine, watched)
    assert any(plan.saves for plan in watched.plans) and any(plan.loads for plan in watched.plans)


def test_the_next_turn_begins_with_what_was_seen_and_said(manifest: Manifest, speech: Speech) -> None:
    first = [Item("message", "user", "Hi")]
    prompt = speech.lay_out(first, manifest.release).ids
    generated = [4093, 28, 638, 506]
    answer = Item("message", "assistant", "whatever it read like", generated, manifest.release)
    again = speech.lay_out([*first, answer, Item("message", "user", "<|im_end|> and?")], manifest.release).ids
    assert again[: len(prompt) + 5] == [*prompt, *generated, manifest.stop_ids[0]]


def test_a_warm_up_teaches_the_engine_its_rates(
    opened: tuple[Runner, list[tuple[StepPlan, StepResult]]], manifest: Manifest, speech: Speech
) -> None:
    engine = Engine(manifest, speech, EngineLimits(slots=SLOTS, context_tokens=CONTEXT, max_waiting=0))
    for plan, result in opened[1]:
        engine.learn(plan, result)
    assert engine.rates.prefill_tokens_s > 0 and engine.rates.decode_tokens_s > 0


class TestDevice:
    @pytest.fixture(autouse=True)
    def no_libraries(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
        yield

    def test_cuda_without_a_cuda_build_is_refused(
        self, smollm2_release: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
        with pytest.raises(DeviceUnavailable, match=r"'cuda'.*offers only CPUExecutionProvider; install the extra"):
            Runner.open(smollm2_release, manifest, "cuda", 1, 1, 64)

    def test_a_silent_fall_back_to_the_cpu_is_refused(
        self, smollm2_release: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class FellBack:
            def __init__(self, *_: Any, **__: Any) -> None: ...

            def get_providers(self) -> list[str]:
                return ["CPUExecutionProvider"]

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "InferenceSession", FellBack)
        with pytest.raises(DeviceUnavailable, match="set device"):
            Runner.open(smollm2_release, manifest, "cuda", 1, 1, 64)

    def test_a_gpu_without_the_library_that_copies_is_refused(
        self, smollm2_release: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class OnTheGpu:
            def __init__(self, *_: Any, **__: Any) -> None: ...

            def get_providers(self) -> list[str]:
                return ["CUDAExecutionProvider"]

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "InferenceSession", OnTheGpu)
        monkeypatch.setattr(onnxruntime, "cuda_version", "99.1")
        with pytest.raises(DeviceUnavailable, match=r"libcudart\.so\.99 cannot be loaded.*edge-cuda"):
            Runner.open(smollm2_release, manifest, "cuda", 1, 1, 64)

    def test_a_context_beyond_the_graph_is_refused(self, smollm2_release: Path, manifest: Manifest) -> None:
        with pytest.raises(ConfigError, match="holds 2 to 8192"):
            Runner.open(smollm2_release, manifest, "cpu", 1, 1, 8193)
