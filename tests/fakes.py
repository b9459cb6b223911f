"""Stand-ins that behave, for tests that need no model.

`FakeRunner` keeps a KV pool of (id, path) pairs and makes logits from a hash of the prefix that it
reads there, so an engine that reads garbage, mixes up slots or takes the wrong path says something else
than `said_alone`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from core.conversation import Item
from core.frames import Delta, Generate, ItemEnd, ItemStart, Sampling, Text
from core.manifest import FORMAT, KvShape, Manifest, Source
from edge_node.engine.sampling import sample
from edge_node.engine.speech import PLAIN, Setting, SpeechError
from edge_node.engine.step import Chunk, Decode, Logits, StepPlan, StepResult

STOP_ID = 0
TOKENIZER_SIZE = 40
VOCAB_SIZE = 48

Path: TypeAlias = Literal["chunk", "one", "nothing"]
Written: TypeAlias = tuple[int, Path]


def fake_manifest(release: str = "fake@000000000000") -> Manifest:
    """A release without files, for FakeSpeech and FakeRunner."""
    return Manifest(
        format=FORMAT,
        graph_abi=1,
        model=release.split("@")[0],
        release=release,
        variant="fake",
        family="fake",
        exporter_version="0",
        source=Source("fake", "0" * 64, "fake"),
        context_tokens=4096,
        vocab_size=VOCAB_SIZE,
        tokenizer_size=TOKENIZER_SIZE,
        kv=KvShape(1, 1, 1, "float32"),
        stop_ids=[STOP_ID],
        bos_id=None,
        batch_invariant=True,
        device="cpu",
        operators=[],
        speech="chat_template",
        graph="model.onnx",
        tokenizer="tokenizer.json",
        chat_template="chat_template.jinja",
        quality=None,
        files=[],
        claims={},
        golden=[],
    )


def generate(
    stream: str = "s",
    text: str = "hello",
    *,
    epoch: int = 1,
    output_ids: Sequence[int] = (),
    seed: int = 7,
    temperature: float = 1.0,
    most: int = 8,
    stop: Sequence[str] = (),
    items: list[Item] | None = None,
    truncation: Literal["auto", "disabled"] = "disabled",
    dropped_items: int = 0,
) -> Generate:
    """A request to the fake release."""
    return Generate(
        stream=stream,
        epoch=epoch,
        release=fake_manifest().release,
        items=items or [Item("message", "user", text)],
        output_ids=list(output_ids),
        seed=seed,
        sampling=Sampling(temperature),
        stop=list(stop),
        max_output_tokens=most,
        truncation=truncation,
        dropped_items=dropped_items,
    )


class FakeSpeech:
    """A letter is an id; id n says a letter, STOP_ID ends. Contents with a '!' cannot be rendered."""

    def render(self, items: list[Item], release: str, setting: Setting = PLAIN) -> list[int]:
        """One id for each character of each item."""
        if any("!" in item.text for item in items):
            raise SpeechError("This conversation cannot be rendered.")
        return [1 + ord(letter) % (TOKENIZER_SIZE - 1) for item in items for letter in item.text]

    def least_tokens(self, items: list[Item], release: str, setting: Setting = PLAIN) -> int:
        return sum(len(item.text) // 2 for item in items)

    def start(self, stop: Sequence[str] = ()) -> FakeParser:
        return FakeParser()


class FakeParser:
    """Says one letter an id; pushing id `breaks_on` raises, as a bug in a parser would."""

    breaks_on = -1
    reasoning_tokens = 0

    def __init__(self) -> None:
        self.stopped = False
        self._opened = False

    def push(self, token: int, last: bool = False) -> list[Delta]:
        """ItemStart first, ItemEnd at the stop id."""
        if token == self.breaks_on:
            raise ZeroDivisionError("a parser with a bug")
        start: list[Delta] = [] if self._opened else [ItemStart("message")]
        self._opened = True
        self.stopped = token == STOP_ID
        return [*start, ItemEnd() if self.stopped else Text(chr(97 + token % 26))]


class FakeRunner:
    """Runs plans over a pool of written ids. Refuses what the real graph would refuse or compute wrongly."""

    def __init__(self, slots: int, context_tokens: int) -> None:
        self.plans: list[StepPlan] = []
        self._pool: list[list[Written]] = [[(-1, "nothing")] * context_tokens for _ in range(slots)]

    def run(self, plan: StepPlan) -> StepResult:
        """The parts of a plan may run in either order; alternate."""
        self.plans.append(plan)
        if plan.number % 2:
            decoded, read = self._decode(plan.decode), self._chunk(plan.chunk)
        else:
            read, decoded = self._chunk(plan.chunk), self._decode(plan.decode)
        chunk_s = 0.001 * len(plan.chunk.ids) if plan.chunk else 0.0
        decode_s = 0.01 if plan.decode else 0.0
        return StepResult(read, decoded, chunk_s, decode_s)

    def _chunk(self, chunk: Chunk | None) -> Logits | None:
        if chunk is None:
            return None
        slot, end = self._pool[chunk.slot], chunk.start + len(chunk.ids)
        assert len(chunk.ids) >= 2, "a lone token takes the one-token path"
        assert chunk.start >= 0 and end <= len(slot), "outside the slot"
        slot[chunk.start : end] = [(token, "chunk") for token in chunk.ids]
        rows = [logits_after(slot[: chunk.start + index + 1]) for index in chunk.wanted]
        return np.array(rows, np.float32).reshape(-1, VOCAB_SIZE)

    def _decode(self, decode: Decode | None) -> Logits | None:
        if decode is None:
            return None
        for row, (token, end) in enumerate(zip(decode.ids, decode.ends, strict=True)):
            self._pool[decode.first_slot + row][end - 1] = (token, "one")
        rows = [self._pool[decode.first_slot + row][: decode.ends[row]] for row in decode.wanted]
        return np.array([logits_after(prefix) for prefix in rows], np.float32).reshape(-1, VOCAB_SIZE)


def logits_after(prefix: list[Written]) -> Logits:
    """What the fake model thinks after these ids, computed on these paths; padding ids look best."""
    digest = hashlib.sha256(repr(prefix).encode()).digest()
    logits = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(VOCAB_SIZE)
    logits[TOKENIZER_SIZE:] += 100
    return logits.astype(np.float32)


def said_alone(request: Generate, context_tokens: int, speech: FakeSpeech | None = None) -> list[int]:
    """All output ids of a request that nothing disturbs: the oracle, without any engine."""
    prompt = (speech or FakeSpeech()).render(request.items, request.release)
    most = min(request.max_output_tokens, context_tokens - len(prompt))
    output: list[int] = []
    while len(output) < most and STOP_ID not in output:
        prefix: list[Written] = [(token, "chunk") for token in prompt]
        prefix += [(token, "one") for token in output]
        output.append(sample(logits_after(prefix), request.sampling, TOKENIZER_SIZE, request.seed, len(output)))
    return output
