"""Answers held to a format: by which ids, from where on, and what becomes of one that cannot be held."""

from __future__ import annotations

import json
from functools import cache

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from core.frames import Done, Failed, Sampling
from edge_node.engine.engine import EngineLimits
from edge_node.engine.grammar import Grammars, UnsupportedFormat
from edge_node.engine.ladder import VERIFIED_LENGTHS
from edge_node.engine.speech.detokeniser import byte_table
from edge_node.engine.step import Chunk, StepPlan, StepResult
from tests.edge_node.engine.scripted import (
    HEAD,
    AnyGuide,
    FakeGrammars,
    HeadedSpeech,
    Node,
    Scripted,
    ThirdsGuide,
    greedy,
)
from tests.edge_node.engine.speech.tiny_tokenizer import END, tiny_manifest, tiny_speech, tokenizer_json
from tests.fakes import FakeRunner, FakeSpeech, generate, said_alone

CONTEXT = 256
LIMITS = EngineLimits(slots=2, context_tokens=CONTEXT, max_waiting=4, chunk_tokens=64)
MOST = 14


def headed(*given: int) -> tuple[Node, FakeGrammars]:
    """A held answer after its given ids; the model writes the head and then whatever may come."""
    grammars = FakeGrammars()
    node = Node(LIMITS, Scripted(HEAD, 5), HeadedSpeech(), grammars)
    node.answer(greedy(held=True, most=MOST, output_ids=given))
    return node, grammars


# -- what the guide is told, and what it rules --------------------------------------------------


def test_thought_and_header_are_free_and_every_id_of_the_text_is_held() -> None:
    node, grammars = headed()
    assert node.ids()[: len(HEAD)] == HEAD
    text = node.ids()[len(HEAD) :]
    assert len(text) == MOST - len(HEAD)
    assert [token % 3 for token in text] == [at % 3 for at in range(len(text))]
    (guide,) = grammars.guides
    assert guide.heard == text, "neither thought nor header"


@pytest.mark.parametrize("given", range(1, MOST))
def test_a_held_answer_that_is_continued_anywhere_says_exactly_the_rest(given: int) -> None:
    whole = headed()[0].ids()
    node, grammars = headed(*whole[:given])
    assert node.ids() == whole[given:]
    (guide,) = grammars.guides
    assert guide.heard == whole[len(HEAD) :], "given ids of the text are heard like chosen ones"


def test_an_answer_without_a_format_asks_for_no_guide() -> None:
    grammars = FakeGrammars()
    node = Node(LIMITS, Scripted(HEAD, 5), HeadedSpeech(), grammars)
    node.answer(greedy(most=MOST), msgspec.structs.replace(greedy(stream="t"), format={"type": "text"}))
    assert grammars.guides == []


# -- drafts -------------------------------------------------------------------------------------


def drafted(held: bool = False, exact: bool = False) -> tuple[list[int], int]:
    """The ids of an answer that repeats its prompt, and how many steps verified drafts."""
    text = "abcdefghij" * 6
    prompt = FakeSpeech().lay_out(greedy(text).items, "").ids
    limits = msgspec.structs.replace(LIMITS, speculation=True)
    node = Node(limits, Scripted(prompt, len(prompt)), grammars=FakeGrammars(AnyGuide))
    for length in VERIFIED_LENGTHS:
        verifying = StepPlan(0, Chunk(0, 0, [0] * length, list(range(length))), None, 0.0)
        node.engine.learn(verifying, StepResult(None, None, chunk_s=0.001 * length))
    node.answer(msgspec.structs.replace(greedy(text, held=held, most=40), exact=exact))
    return node.ids(), sum(plan.chunk is not None and len(plan.chunk.wanted) > 1 for plan in node.plans)


def test_no_drafts_are_made_for_an_answer_that_is_held_to_a_format_or_to_be_exact() -> None:
    free, drafts = drafted()
    assert drafts > 0, "this answer is worth drafting"
    assert drafted(held=True) == (free, 0)
    assert drafted(exact=True) == (free, 0)


# -- what cannot be held ------------------------------------------------------------------------


class LostGuide(ThirdsGuide):
    """Cannot go on after three ids."""

    def allowed(self) -> NDArray[np.bool_]:
        if len(self.heard) == 3:
            raise UnsupportedFormat("there is a place where nothing satisfies it")
        return super().allowed()


def test_an_answer_whose_guide_loses_its_way_ends_alone_with_that_reason() -> None:
    node = Node(LIMITS, FakeRunner(2, CONTEXT), grammars=FakeGrammars(LostGuide))
    free, later = generate("free", "other", seed=3), generate("later", "next", seed=5)
    node.answer(greedy(held=True, stream="held"), free)
    failed = node.ended("held")
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("unsupported_parameter", False)
    assert failed.message == UnsupportedFormat("there is a place where nothing satisfies it").message
    assert len(node.ids("held")) == 3, "what was said before stays said"
    assert [(fault.stream, type(fault.error)) for fault in node.engine.take_faults()] == [("held", UnsupportedFormat)]
    node.answer(later)
    for request in (free, later):
        assert node.ids(request.stream) == said_alone(request, CONTEXT)
        assert isinstance(node.ended(request.stream), Done)


# -- the real grammar ---------------------------------------------------------------------------

FORM = {
    "type": "json_schema",
    "name": "form",
    "schema": {
        "type": "object",
        "properties": {"who": {"enum": ["Ada", "Bob"]}, "sure": {"type": "boolean"}},
        "required": ["who", "sure"],
        "additionalProperties": False,
    },
}
WORDS = 262


@cache
def grammars() -> Grammars:
    return Grammars(byte_table(json.loads(tokenizer_json())), WORDS, frozenset({END}))


def written(*given: int) -> tuple[list[int], Done | Failed]:
    """What is said after the given ids by a model that knows nothing of JSON."""
    manifest = msgspec.structs.replace(tiny_manifest(), tokenizer_size=WORDS, vocab_size=WORDS)
    node = Node(LIMITS, Scripted([], 0, WORDS), tiny_speech(), grammars(), manifest)
    request = generate(output_ids=given, most=100)
    request = msgspec.structs.replace(request, release=manifest.release, sampling=Sampling(1.0), format=FORM)
    node.answer(request)
    return node.ids(), node.ended()


def test_any_model_writes_the_form_and_goes_on_with_it_from_anywhere() -> None:
    whole, ended = written()
    assert isinstance(ended, Done) and ended.finish == "stop" and whole[-1] == END
    text = b"".join(tiny_speech().bytes_of(token) for token in whole[:-1]).decode()
    document = json.loads(text)
    assert document["who"] in ("Ada", "Bob") and document["sure"] in (True, False) and len(document) == 2
    for given in range(1, len(whole)):
        rest, ended = written(*whole[:given])
        assert rest == whole[given:] and isinstance(ended, Done), text
