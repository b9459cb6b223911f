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
from edge_node.engine.speech import PLAIN, Rendered, Setting, SpeechError
from edge_node.engine.step import BLOCK_TOKENS, Chunk, Decode, Logits, StepPlan, StepResult

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
    priority: int = 0,
    deadline_s: float = 0.0,
    salt: str = "",
    exact: bool = False,
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
        priority=priority,
        deadline_s=deadline_s,
        cache_salt=salt,
        exact=exact,
    )


class FakeSpeech:
    """A letter is an id; id n says a letter, STOP_ID ends. Contents with a '!' cannot be rendered."""

    closing_ids = frozenset({STOP_ID})

    def lay_out(self, items: list[Item], release: str, setting: Setting = PLAIN) -> Rendered:
        """One id for each character of each item, or those that it was generated as."""
        if any("!" in item.text for item in items):
            raise SpeechError("This conversation cannot be rendered.")
        ids, ends = list[int](), list[int]()
        for item in items:
            ids += item.ids or [1 + ord(letter) % (TOKENIZER_SIZE - 1) for letter in item.text]
            ends.append(len(ids))
        return Rendered(ids, ends)

    def bytes_of(self, token: int) -> bytes:
        return b"" if token == STOP_ID else chr(97 + token % 26).encode()

    def least_tokens(self, items: list[Item], release: str, setting: Setting = PLAIN) -> int:
        return sum(len(item.text) // 2 for item in items)

    def start(self, stop: Sequence[str] = ()) -> FakeParser:
        return FakeParser()


class FakeParser:
    """Says one letter an id; pushing id `breaks_on` raises, as a bug in a parser would."""

    breaks_on = -1
    reasoning_tokens = 0
    answering = True

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
    """Runs plans over a pool of written ids. Refuses what the real graph would refuse or compute wrongly.

    paths_differ: whether the one-token path and the chunk path give different numbers, as real graphs do.
    """

    def __init__(self, slots: int, context_tokens: int, blocks: int = 0, paths_differ: bool = True) -> None:
        self.plans: list[StepPlan] = []
        self._pool: list[list[Written]] = [[(-1, "nothing")] * context_tokens for _ in range(slots)]
        self._blocks: list[list[Written]] = [[(-1, "nothing")] * BLOCK_TOKENS for _ in range(blocks)]
        self._one: Path = "one" if paths_differ else "chunk"

    def run(self, plan: StepPlan) -> StepResult:
        """The parts of a plan may run in either order; alternate."""
        self.plans.append(plan)
        self._copy_before(plan)
        if plan.number % 2:
            decoded, read = self._decode(plan.decode), self._chunk(plan.chunk)
        else:
            read, decoded = self._chunk(plan.chunk), self._decode(plan.decode)
        self._copy_after(plan)
        chunk_s = 0.001 * len(plan.chunk.ids) if plan.chunk else 0.0
        decode_s = 0.01 + 0.001 * len(plan.decode.ids) if plan.decode else 0.0
        return StepResult(read, decoded, chunk_s, decode_s, copy_s=0.0001)

    def _copy_before(self, plan: StepPlan) -> None:
        for move in plan.moves:
            assert move.source != move.target
            self._pool[move.target][: move.tokens] = self._pool[move.source][: move.tokens]
            self._pool[move.source][:] = [(-2, "nothing")] * len(self._pool[move.source])
        for load in plan.loads:
            for index, block in enumerate(load.blocks):
                at = index * BLOCK_TOKENS
                self._pool[load.slot][at : at + BLOCK_TOKENS] = self._blocks[block]

    def _copy_after(self, plan: StepPlan) -> None:
        for save in plan.saves:
            for index, block in enumerate(save.blocks):
                at = (save.first + index) * BLOCK_TOKENS
                assert at + BLOCK_TOKENS <= len(self._pool[save.slot])
                self._blocks[block] = self._pool[save.slot][at : at + BLOCK_TOKENS]
                assert all(path == "chunk" for _, path in self._blocks[block]), "only canonical positions are kept"

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
            self._pool[decode.first_slot + row][end - 1] = (token, self._one)
        rows = [self._pool[decode.first_slot + row][: decode.ends[row]] for row in decode.wanted]
        return np.array([logits_after(prefix) for prefix in rows], np.float32).reshape(-1, VOCAB_SIZE)


def logits_after(prefix: list[Written]) -> Logits:
    """What the fake model thinks after these ids, computed on these paths; padding ids look best."""
    digest = hashlib.sha256(repr(prefix).encode()).digest()
    logits = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(VOCAB_SIZE)
    logits[TOKENIZER_SIZE:] += 100
    return logits.astype(np.float32)


def said_alone(
    request: Generate, context_tokens: int, paths_differ: bool = True, given_read: bool = False
) -> list[int]:
    """All output ids, those given included, of a request that nothing disturbs: the oracle, without any engine.

    given_read: whether the given ids take the chunk path, as the prompt does.
    """
    prompt = FakeSpeech().lay_out(request.items, request.release).ids
    most = min(request.max_output_tokens, context_tokens - len(prompt))
    output = list(request.output_ids)
    read = len(output) if given_read else 0
    while len(output) < most and STOP_ID not in output:
        prefix: list[Written] = [(token, "chunk") for token in [*prompt, *output[:read]]]
        prefix += [(token, "one" if paths_differ else "chunk") for token in output[read:]]
        output.append(sample(logits_after(prefix), request.sampling, TOKENIZER_SIZE, request.seed, len(output)))
    return output
