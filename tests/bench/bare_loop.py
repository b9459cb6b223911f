"""The graph alone: run a decode batch, take the best id of each row, again. What every loop around it is held against.

    python -m tests.bench.bare_loop releases/smollm2-135m --threads 2
    python -m tests.bench.bare_loop releases/smollm2-135m --serve       one JSON request a line, see `Asked`

KV bound in place, no router, link, speech, scheduler or sampling. Prints JSON, a line an answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from core.manifest import MANIFEST_NAME, Manifest, decode_manifest
from edge_node.engine.ladder import LADDER
from edge_node.engine.step import Chunk, Decode, StepPlan, StepRunner
from edge_node.runtime.runner import Runner

SLOTS = 8
CONTEXT_TOKENS = 1024
PROMPT_TOKENS = 128


class Asked(msgspec.Struct, frozen=True):
    """A request to a serving loop: read these ids, one prompt a slot, and time so many steps after them."""

    prompts: list[list[int]]
    steps: int


class BareLoop:
    """One batch in adjacent slots, all rows wanted."""

    def __init__(self, runner: StepRunner, prompts: Sequence[Sequence[int]], first_slot: int = 0) -> None:
        """Reads the prompts; at least two ids each."""
        self._runner = runner
        self._first_slot = first_slot
        self._ends = [len(prompt) for prompt in prompts]
        self._ids = [1] * len(prompts)
        for row, prompt in enumerate(prompts):
            read(runner, first_slot + row, prompt)

    def step(self) -> None:
        """One id for each prompt."""
        self._ends = [end + 1 for end in self._ends]
        decode = Decode(self._first_slot, self._ids, self._ends, list(range(len(self._ids))))
        logits = self._runner.run(StepPlan(0, None, decode, 0.0)).decode_logits
        assert logits is not None
        self._ids = [int(row.argmax()) for row in logits]


def read(runner: StepRunner, slot: int, ids: Sequence[int]) -> None:
    """Put a prompt into a slot: whole chunks of the ladder, its end padded (decoding overwrites that)."""
    most = LADDER[-1]
    for start in range(0, len(ids), most):
        piece = list(ids[start : start + most])
        length = next(step for step in LADDER if step >= len(piece))
        runner.run(StepPlan(0, Chunk(slot, start, piece + [0] * (length - len(piece)), []), None, 0.0))


def tokens_s(runner: StepRunner, prompts: Sequence[Sequence[int]], steps: int) -> float:
    """Tokens per second of all rows together, over all steps."""
    loop = BareLoop(runner, prompts)
    loop.step()  # the first of a shape allocates
    began = time.perf_counter()
    for _ in range(steps):
        loop.step()
    return steps * len(prompts) / (time.perf_counter() - began)


def prefill_tokens_s(runner: StepRunner, length: int, repeats: int = 3) -> float:
    """Tokens per second of a prompt's first chunk, of a length on the ladder."""
    plan = StepPlan(0, Chunk(0, 0, [7] * length, []), None, 0.0)
    runner.run(plan)
    return length / statistics.median(runner.run(plan).chunk_s for _ in range(repeats))


def open_runner(folder: Path, threads: int, slots: int = SLOTS, context_tokens: int = CONTEXT_TOKENS) -> Runner:
    """A release's graph, warm."""
    runner = Runner.open(folder, read_manifest(folder), "cpu", threads, slots, context_tokens)
    runner.warm_up()
    return runner


def read_manifest(folder: Path) -> Manifest:
    return decode_manifest((folder / MANIFEST_NAME).read_bytes(), str(folder))


def serve(runner: StepRunner) -> None:
    """Answer each line of stdin until it ends."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = msgspec.json.decode(line, type=Asked)
        print(json.dumps({"tokens_s": tokens_s(runner, asked.prompts, asked.steps)}), flush=True)


def main() -> None:
    """Measure and print, or serve."""
    options = _options()
    runner = open_runner(options.release, options.threads)
    if options.serve:
        serve(runner)
        return
    report: dict[str, object] = {"release": read_manifest(options.release).release, "threads": options.threads}
    for streams in (1, SLOTS):
        prompts = [[7 + slot] * PROMPT_TOKENS for slot in range(streams)]
        rates = [tokens_s(runner, prompts, options.steps) for _ in range(options.repeats)]
        report[f"streams_{streams}"] = {"bare_tokens_s": round(statistics.median(rates), 1)}
    report["prefill_tokens_s"] = {length: round(prefill_tokens_s(runner, length)) for length in (128, 256, 512)}
    print(json.dumps(report, indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path, help="folder with manifest.json")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime (default 1)")
    parser.add_argument("--steps", type=int, default=64, help="decode steps of a measurement (default 64)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements (default 3)")
    parser.add_argument("--serve", action="store_true", help="answer requests on stdin")
    return parser.parse_args()


if __name__ == "__main__":
    main()
