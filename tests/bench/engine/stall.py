"""What those who are being answered notice of a long new prompt, and what the prompt pays for that."""

from __future__ import annotations

import statistics
from itertools import pairwise

from edge_node.engine.engine import EngineLimits
from edge_node.runtime.runner import Runner
from tests.bench.bare_loop import SLOTS, read_manifest
from tests.bench.engine.loops import (
    EngineLoop,
    all_writing,
    endless,
    in_turn,
    request,
    speech_of,
    story,
    time_to_first,
)
from tests.bench.engine.rows import Found, Scale, at_most, ratios, row, tell
from tests.bench.report import THREADS

PROMPT_TOKENS = 2000
CONTEXT_TOKENS = 4096
STREAMS = SLOTS - 1
# The engine's rule when max_stall_ms is 0: two decode steps, at least this.
LEAST_STALL_MS = 50.0
STEPS = 1.2


def measure(scale: Scale) -> Found:
    """A round: the prompt alone, then seven streams, then both together."""
    folder = endless()
    manifest = read_manifest(folder)
    speech = speech_of(folder, manifest)
    runner = Runner.open(folder, manifest, "cpu", THREADS, SLOTS, CONTEXT_TOKENS)
    warm = runner.warm_up(True)
    limits = EngineLimits(slots=SLOTS, context_tokens=CONTEXT_TOKENS, max_waiting=0, speculation=True)
    over: list[float] = []
    p99_ms: list[float] = []
    allowed_ms: list[float] = []
    alone_s: list[float] = []
    beside_s: list[float] = []
    for number in range(scale(4, 1)):
        tell(f"round {number + 1}")
        text = long_prompt(number)
        loop = EngineLoop(runner, manifest, speech, limits)
        loop.learn(warm)
        alone_s.append(time_to_first(loop, request(manifest, "alone", text, 1)))
        running = [loop.submit(request(manifest, str(i), story(i), CONTEXT_TOKENS)) for i in range(STREAMS)]
        loop.until(all_writing(running))
        step_ms = 1e3 * statistics.median(in_turn(scale(40, 8), loop.step)[0])
        before = [len(answer.times_s) for answer in running]
        beside_s.append(time_to_first(loop, request(manifest, "beside", text, 1)))
        gaps = [
            1e3 * (later - earlier)
            for answer, first in zip(running, before, strict=True)
            for earlier, later in pairwise(answer.times_s[first - 1 :])
        ]
        p99_ms.append(statistics.quantiles(gaps, n=100, method="inclusive")[98])
        allowed_ms.append(max(LEAST_STALL_MS, 2 * step_ms) + STEPS * step_ms)
        over.append(p99_ms[-1] / allowed_ms[-1])
    rows = [
        row("p99 inter-token time over (max_stall_ms + 1.2 steps)", over, "x", at_most(1.0), 2),
        row("p99 inter-token time", p99_ms, "ms"),
        row("max_stall_ms (two steps, at least 50 ms) + 1.2 steps", allowed_ms, "ms"),
        row("the prompt, alone", alone_s, "s", digits=2),
        row("the prompt, beside seven streams", beside_s, "s", digits=2),
        row("the prompt, beside over alone", ratios(beside_s, alone_s), "x"),
    ]
    notes = [
        f"{STREAMS} streams are running when a prompt of {PROMPT_TOKENS} tokens comes; {THREADS} threads; a step is "
        "the median one of the seven before it came."
    ]
    return Found("stall", "A long prompt while others are being answered", rows, notes)


def long_prompt(number: int) -> str:
    """About PROMPT_TOKENS tokens that no other round begins with: words of one token each."""
    return f"Round {number}. " + "river stone bread cloud " * (PROMPT_TOKENS // 4)
