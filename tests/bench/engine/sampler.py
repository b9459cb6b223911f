"""Sampling at GPT-OSS's vocabulary as a share of a decode step."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

from core.manifest import MANIFEST_NAME
from tests.bench import sampling
from tests.bench.bare_loop import SLOTS, BareLoop, open_runner
from tests.bench.engine.loops import in_turn
from tests.bench.engine.rows import KEPT, Found, Scale, at_most, row, tell
from tests.bench.report import ROOT, THREADS
from tests.tools.gpt_oss_checkpoint import FULL, write_checkpoint

VOCABULARY = 201_088
# All that a token passes through in two of the 24 layers; experts that no token asks for would only take room.
SHAPE = replace(FULL, layers=2, experts=FULL.top_k)
RECIPE = "cpu-int4"
CONTEXT_TOKENS = 256
SURE = 3.0
"""The width of rows of a model that has learnt something (tests/bench/sampling.py)."""


def measure(scale: Scale) -> Found:
    """Steps and samples in turn."""
    runner = open_runner(release(), THREADS, SLOTS, CONTEXT_TOKENS)
    loops = {streams: BareLoop(runner, [[7 + i] * 32 for i in range(streams)]) for streams in (1, SLOTS)}
    steps_ms: dict[int, list[float]] = {streams: [] for streams in loops}
    row_us: dict[str, list[float]] = {}
    for _ in range(scale(5, 1)):
        for mode, value in sampling.measure(VOCABULARY, SURE, 3).items():
            row_us.setdefault(mode, []).append(value)
        for streams, loop in loops.items():
            steps_ms[streams].append(1e3 * statistics.median(in_turn(scale(8, 3), loop.step)[0]))
    rows = []
    for streams, steps in steps_ms.items():
        rows.append(row(f"decode step of two layers, streams: {streams}", steps, "ms"))
        for mode in row_us:
            shares = [streams * value / (10 * step) for value, step in zip(row_us[mode], steps, strict=True)]
            rows.append(row(f"sampling over that step, streams: {streams}, {mode}", shares, "%", at_most(10), 2))
    notes = [
        f"Vocabulary {VOCABULARY:,}; {THREADS} threads for the step, one for sampling. The step is that of two layers "
        f"of GPT-OSS-20B's width under its whole vocabulary ({RECIPE}): the model's own, of 24 layers, is several "
        "times as long, so the shares are bounds from above. Rows are noise as wide as a trained model's."
    ]
    return Found("sampler", "Sampling at GPT-OSS's vocabulary", rows, notes)


def release() -> Path:
    """The synthetic release, exported once."""
    folder, source = KEPT / f"gpt-oss-{SHAPE.layers}-{RECIPE}", KEPT / "gpt-oss-checkpoint"
    if not (folder / MANIFEST_NAME).is_file():
        tell("writing and exporting two layers of GPT-OSS's width")
        shutil.rmtree(source, ignore_errors=True)
        write_checkpoint(source, SHAPE, tokenizer="tiny")
        command = [sys.executable, "-m", "export", str(source), "--recipe", RECIPE, "--out", str(folder), "--no-run"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=PIPE)
        shutil.rmtree(source)
    return folder
