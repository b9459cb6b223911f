"""Answers of the real model that were begun elsewhere: continued exactly they are the undisturbed ones, continued fast
they may differ first where two ids were nearly tied."""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest

from core.conversation import Item
from core.frames import Delta, Done, Generate, Row, Sampling
from core.manifest import Manifest
from edge_node.engine.engine import Engine, EngineLimits
from edge_node.engine.grammar import Grammars
from edge_node.engine.speech import Speech
from edge_node.engine.step import Logits
from edge_node.runtime.runner import Runner
from tests.edge_node.test_runner_drafts import NEAR_TIE
from tests.tools.samples import watch_samples

CONTEXT = 256
BLOCKS = 4
EXACTLY, FAST = float("inf"), 0.0
GREEDY = Sampling(0.0)
SAMPLED = Sampling(0.9, 0.95, 50, repetition_penalty=1.1, frequency_penalty=0.2)
PROMPTS = ("Name three rivers.", "三条河流是什么？ 🏞️", "Tell me a story about a keeper of a lighthouse.")
FORM = {
    "type": "json_schema",
    "name": "river",
    "schema": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "long": {"type": "boolean"}},
        "required": ["name", "long"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def runner(smollm2_release: Path, manifest: Manifest) -> Runner:
    return Runner.open(smollm2_release, manifest, "cpu", 1, 1, CONTEXT, prefix_blocks=BLOCKS)


@pytest.fixture(scope="module")
def grammars(smollm2_release: Path, manifest: Manifest, speech: Speech) -> Grammars:
    return Grammars.open(manifest, (smollm2_release / manifest.tokenizer).read_text(), speech.closing_ids)


@pytest.fixture
def margins(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Position -> how far apart its two best logits were when it was sampled last."""
    seen: dict[int, float] = {}

    def note(logits: Logits, seed: int, position: int) -> None:
        second, best = np.partition(logits, -2)[-2:]
        seen[position] = float(best - second)

    watch_samples(monkeypatch, note)
    return seen


class Talk:
    """The ids and deltas that one request is told, on an engine of its own."""

    def __init__(
        self,
        runner: Runner,
        manifest: Manifest,
        speech: Speech,
        request: Generate,
        exact_s: float = EXACTLY,
        grammars: Grammars | None = None,
    ) -> None:
        limits = EngineLimits(
            slots=1, context_tokens=CONTEXT, max_waiting=0, prefix_blocks=BLOCKS, failover_exact_s=exact_s
        )
        engine = Engine(manifest, speech, limits, grammars)
        engine.submit(request, 0.0)
        self.ids: list[int] = []
        self.deltas: list[list[Delta]] = []
        self.steps = 0
        self.ended: Done | None = None
        while self.ended is None:
            plan = engine.plan(0.0)
            assert plan is not None
            for output in engine.commit(plan, runner.run(plan), 0.0):
                if isinstance(output, Row):
                    self.ids += output.ids
                    self.deltas += output.deltas
                elif isinstance(output, Done):
                    self.ended = output
            engine.check_invariants()
            self.steps += 1


def asking(manifest: Manifest, prompt: str, sampling: Sampling, most: int) -> Generate:
    return Generate("s", 1, manifest.release, [Item("message", "user", prompt)], [], 11, sampling, [], most)


def continued(request: Generate, given: list[int]) -> Generate:
    return msgspec.structs.replace(request, epoch=2, output_ids=given)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_continued_exactly_at_any_cut_an_answer_is_the_uncut_one(
    runner: Runner, manifest: Manifest, speech: Speech, prompt: str, sampling: Sampling
) -> None:
    request = asking(manifest, prompt, sampling, 24)
    whole = Talk(runner, manifest, speech, request)
    for cut in random.Random(prompt).sample(range(1, len(whole.ids)), 3):
        rest = Talk(runner, manifest, speech, continued(request, whole.ids[:cut]))
        assert (rest.ids, rest.deltas) == (whole.ids[cut:], whole.deltas[cut:]), cut


@pytest.mark.parametrize("prompt", PROMPTS)
def test_continued_fast_an_answer_differs_first_where_two_ids_were_nearly_tied(
    runner: Runner, manifest: Manifest, speech: Speech, margins: dict[int, float], prompt: str
) -> None:
    request = asking(manifest, prompt, GREEDY, 40)
    whole = Talk(runner, manifest, speech, request)
    whole_margins = dict(margins)
    for cut in random.Random(prompt).sample(range(1, len(whole.ids)), 3):
        rest = Talk(runner, manifest, speech, continued(request, whole.ids[:cut]), FAST)
        assert rest.steps < len(whole.ids[cut:]) + 3, "given ids are not computed one after another"
        pairs = zip(whole.ids[cut:], rest.ids, strict=False)
        first = next((cut + at for at, (one, other) in enumerate(pairs) if one != other), None)
        if first is None:
            assert rest.ids == whole.ids[cut:]
        else:
            assert whole_margins[first] < NEAR_TIE, (cut, first)


def test_wherever_a_form_was_cut_it_is_filled_in_exactly_as_it_would_have_been(
    runner: Runner, manifest: Manifest, speech: Speech, grammars: Grammars
) -> None:
    request = asking(manifest, "Describe the Rhône as JSON.", Sampling(1.0), 60)
    request = msgspec.structs.replace(request, format=FORM)
    whole = Talk(runner, manifest, speech, request, grammars=grammars)
    assert whole.ended is not None and whole.ended.finish == "stop"
    text = b"".join(speech.bytes_of(token) for token in whole.ids[:-1]).decode()
    assert set(json.loads(text)) == {"name", "long"}
    for cut in range(1, len(whole.ids)):
        again = continued(request, whole.ids[:cut])
        rest = Talk(runner, manifest, speech, again, grammars=grammars)
        assert (rest.ids, rest.deltas) == (whole.ids[cut:], whole.deltas[cut:]), cut
        read = Talk(runner, manifest, speech, again, FAST, grammars)
        filled = b"".join(speech.bytes_of(token) for token in [*whole.ids[:cut], *read.ids[:-1]]).decode()
        assert set(json.loads(filled)) == {"name", "long"}, "whatever is said next, the form is kept"
