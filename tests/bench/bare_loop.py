"""Tokens per second of a release, without router, link or speech.

    python -m tests.bench.bare_loop releases/smollm2-135m --threads 2

Two loops over the same runner, alternating: the bare one (run a decode batch, take the best id, again)
and the engine's own (plan, run, sample, parse, commit). Their difference is what the engine costs.
Prints one JSON object; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime

from core.conversation import Item
from core.frames import Generate, Row, Sampling
from core.manifest import MANIFEST_NAME, Manifest, decode_manifest
from edge_node.engine.engine import Engine, EngineLimits
from edge_node.engine.sampling import sample
from edge_node.engine.speech import open_speech
from edge_node.engine.step import Chunk, Decode, StepPlan
from edge_node.runtime.runner import Runner

SLOTS = 8
CONTEXT_TOKENS = 1024
PROMPT_TOKENS = 128


def main() -> None:
    """Measure and print."""
    options = _options()
    manifest = decode_manifest((options.release / MANIFEST_NAME).read_bytes(), str(options.release))
    runner = Runner.open(options.release, manifest, "cpu", options.threads, SLOTS, CONTEXT_TOKENS)
    runner.warm_up()
    report: dict[str, object] = {
        "release": manifest.release,
        "onnxruntime": onnxruntime.__version__,
        "threads": options.threads,
    }
    for streams in (1, SLOTS):
        if options.bare:
            steps_s = [bare_step_s(runner, streams, options.steps) for _ in range(options.repeats)]
            report[f"streams_{streams}"] = {"bare_tokens_s": round(streams / statistics.median(steps_s), 1)}
            continue
        bare, engine = [], []
        for _ in range(options.repeats):
            bare.append(bare_step_s(runner, streams, options.steps))
            engine.append(engine_step_s(runner, options.release, manifest, streams, options.steps))
        report[f"streams_{streams}"] = {
            "bare_tokens_s": round(streams / statistics.median(bare), 1),
            "engine_tokens_s": round(streams / statistics.median(engine), 1),
            "engine_overhead_ms_a_step": round(1e3 * (statistics.median(engine) - statistics.median(bare)), 3),
        }
    if not options.bare:
        report["prefill_tokens_s"] = {length: round(prefill_rate(runner, length)) for length in (128, 256, 512)}
        report["sampler_us"] = sampler_us(manifest)
    print(json.dumps(report, indent=2))


def prefill_rate(runner: Runner, length: int) -> float:
    """Tokens per second of a prompt's first chunk."""
    plan = StepPlan(0, Chunk(0, 0, [7] * length, []), None, 0.0)
    runner.run(plan)
    return length / statistics.median(runner.run(plan).chunk_s for _ in range(5))


def bare_step_s(runner: Runner, streams: int, steps: int) -> float:
    """Median seconds of a decode step, the best id taken and nothing else."""
    for slot in range(streams):
        runner.run(StepPlan(0, Chunk(slot, 0, [7 + slot] * PROMPT_TOKENS, []), None, 0.0))
    ids, seconds = [7] * streams, []
    for step in range(steps):
        began = time.perf_counter()
        decode = Decode(0, ids, [PROMPT_TOKENS + step + 1] * streams, list(range(streams)))
        logits = runner.run(StepPlan(0, None, decode, 0.0)).decode_logits
        assert logits is not None
        ids = [int(row.argmax()) for row in logits]
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def engine_step_s(runner: Runner, folder: Path, manifest: Manifest, streams: int, steps: int) -> float:
    """Median seconds of a step in which all streams write, sampled at temperature 0.7 and top-p 0.95."""
    endless = Manifest(**{**{name: getattr(manifest, name) for name in Manifest.__struct_fields__}, "stop_ids": []})
    speech = open_speech(endless, lambda name: (folder / name).read_text())
    limits = EngineLimits(slots=SLOTS, context_tokens=CONTEXT_TOKENS, max_waiting=0, max_stall_ms=60_000)
    engine = Engine(endless, speech, limits)
    for stream in range(streams):
        items = [Item("message", "user", " river" * (PROMPT_TOKENS - 30))]
        sampling = Sampling(0.7, 0.95)
        engine.submit(Generate(str(stream), 1, manifest.release, items, [], stream, sampling, [], CONTEXT_TOKENS), 0.0)
    seconds: list[float] = []
    while len(seconds) < steps:
        began = time.perf_counter()
        plan = engine.plan(began)
        assert plan is not None
        outputs = engine.commit(plan, runner.run(plan), began)
        if plan.chunk is None and sum(isinstance(output, Row) for output in outputs) == streams:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def sampler_us(manifest: Manifest) -> dict[str, int]:
    """Median microseconds to sample one row that is shaped like a real one: a few likely ids, a long tail."""
    rows = np.random.default_rng(1).standard_normal((50, manifest.vocab_size)).astype(np.float32) * 3
    modes = {
        "greedy": Sampling(0.0),
        "temperature": Sampling(0.7),
        "top_p": Sampling(0.7, 0.95),
        "top_k": Sampling(0.7, 1.0, 40),
    }
    return {name: round(1e6 * _sampler_s(rows, mode, manifest.tokenizer_size)) for name, mode in modes.items()}


def _sampler_s(rows: np.ndarray, sampling: Sampling, size: int) -> float:
    seconds = []
    for position, row in enumerate(rows):
        began = time.perf_counter()
        sample(row, sampling, size, 1, position)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path, help="folder with manifest.json")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime (default 1)")
    parser.add_argument("--steps", type=int, default=64, help="decode steps of a measurement (default 64)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each loop (default 3)")
    parser.add_argument("--bare", action="store_true", help="the bare loop only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
