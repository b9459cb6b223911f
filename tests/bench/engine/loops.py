"""The engine's own loop in this process, over a real graph: plan, run, sample, parse, commit.

Several loops can take turns on one runner: each has its own slots (`Shifted`), so steps of two loops can
alternate, which is the fairest comparison that a shared machine allows.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from core.conversation import Item
from core.frames import Done, Failed, Generate, Row, Sampling
from core.manifest import MANIFEST_NAME, Manifest
from edge_node.engine.engine import Engine, EngineLimits
from edge_node.engine.speech import Speech, open_speech
from edge_node.engine.step import StepPlan, StepResult, StepRunner
from tests.bench.bare_loop import read_manifest
from tests.bench.engine.rows import KEPT
from tests.bench.report import ROOT

RELEASE = ROOT / "releases/smollm2-135m"
MODEL = "smollm2-135m"
DEFAULT_SAMPLING = Sampling(0.7, 0.95)
"""What a router asks for when the client says nothing (configs/router.toml)."""
GREEDY = Sampling(0.0)
TOPICS = (
    "the number seven and the river it fell into",
    "a lighthouse keeper who is afraid of the dark, and the ship that comes to find out why",
    "bread",
    "two clocks in one room that never agree, told by the younger of the two",
    "how the first map of a village was drawn by somebody who had never left it",
    "a violin",
    "the last day of a summer that would not end, and what the children did with it",
    "an astronomer who loses her glasses",
)


def endless(release: Path = RELEASE) -> Path:
    """The release with a stop id that no answer holds, so that they are as long as was asked; its files are links."""
    folder = KEPT / f"{release.name}-endless"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(release, folder, copy_function=_link)
    manifest = read_manifest(release)
    manifest = msgspec.structs.replace(manifest, stop_ids=[manifest.tokenizer_size - 1])
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
    return folder


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def speech_of(folder: Path, manifest: Manifest) -> Speech:
    return open_speech(manifest, lambda name: (folder / name).read_text(encoding="utf-8"))


def story(index: int) -> str:
    """One of eight different prompts."""
    return f"Tell me a long story about {TOPICS[index % len(TOPICS)]}."


def request(manifest: Manifest, stream: str, text: str, most: int, sampling: Sampling = DEFAULT_SAMPLING) -> Generate:
    """A fresh conversation of one message; its seed is its name's."""
    items = [Item("message", "user", text)]
    return Generate(stream, 1, manifest.release, items, [], sum(stream.encode()), sampling, [], most)


class Shifted:
    """The same runner, some slots further on; its blocks are not shared, so copies of prefixes are refused."""

    def __init__(self, runner: StepRunner, by: int) -> None:
        self._runner = runner
        self._by = by

    def run(self, plan: StepPlan) -> StepResult:
        if plan.loads or plan.saves:
            raise ValueError("A shifted loop has no prefix blocks of its own; give it prefix_blocks=0.")
        by = self._by
        chunk = plan.chunk and replace(plan.chunk, slot=plan.chunk.slot + by)
        decode = plan.decode and replace(plan.decode, first_slot=plan.decode.first_slot + by)
        moves = [replace(move, source=move.source + by, target=move.target + by) for move in plan.moves]
        return self._runner.run(replace(plan, chunk=chunk, decode=decode, moves=moves))


@dataclass
class Answer:
    """What one stream said and when."""

    ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    ended: bool = False


class EngineLoop:
    """An engine, its runner and everything it has said."""

    def __init__(self, runner: StepRunner, manifest: Manifest, speech: Speech, limits: EngineLimits) -> None:
        self.engine = Engine(manifest, speech, limits)
        self.answers: dict[str, Answer] = {}
        self._runner = runner

    def learn(self, measured: Sequence[tuple[StepPlan, StepResult]]) -> None:
        """What a warm-up cost."""
        for plan, result in measured:
            self.engine.learn(plan, result)

    def submit(self, asked: Generate) -> Answer:
        answer = self.answers[asked.stream] = Answer()
        self._hear(self.engine.submit(asked, time.monotonic()))
        return answer

    def step(self) -> None:
        """One step, as the worker does it; raises RuntimeError when there is none."""
        plan = self.engine.plan(time.monotonic())
        if plan is None:
            raise RuntimeError("The engine has nothing to do.")
        result = self._runner.run(plan)
        self._hear(self.engine.commit(plan, result, time.monotonic()))

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.step()

    def _hear(self, outputs: Sequence[object]) -> None:
        now_s = time.perf_counter()
        for output in outputs:
            match output:
                case Row():
                    answer = self.answers[output.stream]
                    answer.ids += output.ids
                    answer.times_s += [now_s] * len(output.ids)
                case Done():
                    self.answers[output.stream].ended = True
                case Failed():
                    raise RuntimeError(f"bench: {output.message}")
                case _:
                    pass


def all_writing(answers: Sequence[Answer]) -> Callable[[], bool]:
    """Whether each has begun."""
    return lambda: all(answer.ids for answer in answers)


def all_ended(answers: Sequence[Answer]) -> Callable[[], bool]:
    return lambda: all(answer.ended for answer in answers)


def time_to_first(loop: EngineLoop, asked: Generate) -> float:
    """Seconds from submission to the first id."""
    began = time.perf_counter()
    answer = loop.submit(asked)
    loop.until(all_writing([answer]))
    return answer.times_s[0] - began


def in_turn(steps: int, *loops: Callable[[], None]) -> list[list[float]]:
    """Seconds of each loop's steps, one of each after another."""
    seconds: list[list[float]] = [[] for _ in loops]
    for _ in range(steps):
        for loop, taken in zip(loops, seconds, strict=True):
            began = time.perf_counter()
            loop()
            taken.append(time.perf_counter() - began)
    return seconds


def in_blocks(seconds: Sequence[float], steps: int) -> list[float]:
    """Sums of so many steps each, what is left over dropped."""
    return [sum(seconds[at : at + steps]) for at in range(0, len(seconds) - steps + 1, steps)]
