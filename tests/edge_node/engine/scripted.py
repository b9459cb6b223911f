"""An engine with its runner in one hand, a model that says what a test wants, and answers with a head and a body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from core.frames import Delta, Done, Failed, Generate, ItemEnd, ItemStart, Row, Sampling, Started, Text
from core.manifest import Manifest
from edge_node.engine.engine import Engine, EngineLimits, Output
from edge_node.engine.grammar import Grammars
from edge_node.engine.speech import Parser, Speech
from edge_node.engine.step import Logits, StepPlan, StepResult
from tests.fakes import STOP_ID, TOKENIZER_SIZE, VOCAB_SIZE, FakeSpeech, fake_manifest, generate

CLOSE, OPEN = 2, 3
HEAD = [7, 8, CLOSE, 4, OPEN]
"""A thought of two ids, its end, and the header of the answer: one id and the last of it."""


class Runner(Protocol):
    def run(self, plan: StepPlan) -> StepResult: ...


class Node:
    """An engine with its runner and a clock that the test sets; `outputs` is all that was said."""

    def __init__(
        self,
        limits: EngineLimits,
        runner: Runner,
        speech: Speech | None = None,
        grammars: object = None,
        manifest: Manifest | None = None,
    ) -> None:
        """grammars: `Grammars` or what can stand in for them."""
        held = cast(Grammars | None, grammars)
        self.engine = Engine(manifest or fake_manifest(), speech or FakeSpeech(), limits, held)
        self.runner = runner
        self.now_s = 0.0
        self.plans: list[StepPlan] = []
        self.outputs: list[Output] = []

    def submit(self, *requests: Generate) -> None:
        for request in requests:
            self.outputs += self.engine.submit(request, self.now_s)

    def step(self) -> bool:
        """False when there was nothing to do."""
        plan = self.engine.plan(self.now_s)
        if plan is None:
            return False
        self.plans.append(plan)
        self.outputs += self.engine.commit(plan, self.runner.run(plan), self.now_s)
        self.engine.check_invariants()
        return True

    def answer(self, *requests: Generate) -> list[Output]:
        """All that is said until nobody waits for an answer, but nothing that an idle engine does."""
        before = len(self.outputs)
        self.submit(*requests)
        while self.engine.running or self.engine.waiting:
            self.step()
        return self.outputs[before:]

    def rest(self) -> None:
        """Whatever an idle engine does."""
        while self.step():
            pass

    def ids(self, stream: str = "s") -> list[int]:
        rows = [output for output in self.outputs if isinstance(output, Row) and output.stream == stream]
        return [token for row in rows for token in row.ids]

    def started(self, stream: str = "s") -> Started:
        (one,) = [output for output in self.outputs if isinstance(output, Started) and output.stream == stream]
        return one

    def ended(self, stream: str = "s") -> Done | Failed:
        (one,) = [output for output in self.outputs if isinstance(output, Done | Failed) and output.stream == stream]
        return one


class Scripted:
    """A model for one prompt: output i is script[i], then whatever a hash of the position likes best."""

    def __init__(self, script: Sequence[int], prompt_tokens: int, vocab_size: int = VOCAB_SIZE) -> None:
        self._script = script
        self._prompt_tokens = prompt_tokens
        self._vocab_size = vocab_size

    def run(self, plan: StepPlan) -> StepResult:
        read = decoded = None
        if plan.chunk is not None:
            read = self._after([plan.chunk.start + index + 1 for index in plan.chunk.wanted])
        if plan.decode is not None:
            decoded = self._after([plan.decode.ends[row] for row in plan.decode.wanted])
        return StepResult(read, decoded, 0.001, 0.01)

    def _after(self, ends: list[int]) -> Logits:
        rows = [self._row(end - self._prompt_tokens) for end in ends]
        return np.array(rows, np.float32).reshape(-1, self._vocab_size)

    def _row(self, position: int) -> NDArray[np.float64]:
        row = np.random.default_rng(position).standard_normal(self._vocab_size)
        if position < len(self._script):
            row[self._script[position]] += 100
        return row


class HeadedSpeech(FakeSpeech):
    """Answers begin with a thought, up to CLOSE, and a header, up to OPEN; both are no text of the answer."""

    def start(self, stop: Sequence[str] = ()) -> Parser:  # type: ignore[override]
        return HeadedParser()


class HeadedParser:
    """`reasoning` item, header without deltas, `message` item; STOP_ID ends. A resumed one is the same."""

    def __init__(self) -> None:
        self.stopped = False
        self.answering = False
        self.reasoning_tokens = 0
        self._thinking = True
        self._opened = False

    def push(self, token: int, last: bool = False) -> list[Delta]:
        if self._thinking:
            self._thinking = token != CLOSE
            self.reasoning_tokens += self._thinking
            return self._say("reasoning", token) if self._thinking else self._end()
        if not self.answering:
            self.answering = token == OPEN
            return []
        self.stopped = token == STOP_ID
        return self._end() if self.stopped else self._say("message", token)

    def _say(self, kind: Any, token: int) -> list[Delta]:
        start: list[Delta] = [] if self._opened else [ItemStart(kind)]
        self._opened = True
        return [*start, Text(chr(97 + token % 26))]

    def _end(self) -> list[Delta]:
        self._opened = False
        return [ItemEnd()]


class ThirdsGuide:
    """After n ids only those of rest n modulo 3 may come, and no STOP_ID: an id too many or too few shows at once."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def allowed(self) -> NDArray[np.bool_]:
        allowed: NDArray[np.bool_] = np.arange(TOKENIZER_SIZE) % 3 == len(self.heard) % 3
        allowed[STOP_ID] = False
        return allowed

    def push(self, token: int) -> None:
        self.heard.append(token)


class AnyGuide(ThirdsGuide):
    """Holds an answer to nothing."""

    def allowed(self) -> NDArray[np.bool_]:
        return np.ones(TOKENIZER_SIZE, np.bool_)


class FakeGrammars:
    """A new guide of one kind for whoever asks; `guides` are all of them."""

    def __init__(self, kind: type[ThirdsGuide] = ThirdsGuide) -> None:
        self.guides: list[ThirdsGuide] = []
        self._kind = kind

    def guide(self, format: dict[str, Any]) -> ThirdsGuide:
        self.guides.append(self._kind())
        return self.guides[-1]


def greedy(
    text: str = "hello",
    *,
    output_ids: Sequence[int] = (),
    most: int = 14,
    top_logprobs: int = -1,
    held: bool = False,
    stream: str = "s",
) -> Generate:
    """Takes what the model likes best. held: to a JSON format."""
    request = generate(stream, text, output_ids=output_ids, most=most)
    sampling = Sampling(0.0, top_logprobs=top_logprobs)
    return msgspec.structs.replace(request, sampling=sampling, format={"type": "json_object"} if held else None)
