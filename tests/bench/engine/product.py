"""Eight streams through the whole product, the engine on a core of its own, against the bare loop on that core."""

from __future__ import annotations

import asyncio
import os
import sys

from tests.bench.bare_loop import SLOTS, read_manifest
from tests.bench.engine.client import Heard, answered, pin_apart, product
from tests.bench.engine.loops import endless, request, speech_of, story
from tests.bench.engine.rows import Found, Scale, at_least, ratios, row, tell
from tests.bench.engine.served import served
from tests.e2e.processes import Fleet


def measure(scale: Scale) -> Found:
    """Pairs in turn; while one is measured the other is idle."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("bench: the theme `product` needs two cores.")
    folder, tokens = endless(), scale(224, 160)
    manifest = read_manifest(folder)
    speech = speech_of(folder, manifest)
    prompts = [speech.lay_out(request(manifest, "", story(i), 1).items, manifest.release).ids for i in range(SLOTS)]
    alone: list[float] = []
    through: list[float] = []
    # Started on that core, so that every thread it has is there.
    bare_loop = ("taskset", "-c", str(cores[0]), sys.executable, "-m", "tests.bench.bare_loop", str(folder), "--serve")
    with product(folder, threads=1) as fleet, served(*bare_loop) as bare:
        pin_apart(fleet, {cores[0]}, set(cores[1:]))
        asyncio.run(eight(fleet, 8))  # warm
        for number in range(scale(6, 1)):
            tell(f"pair {number + 1}")
            alone.append(bare.ask(prompts=prompts, steps=tokens)["tokens_s"])
            through.append(rate(asyncio.run(eight(fleet, tokens))))
    name = f"product over bare loop, streams: {SLOTS}"
    rows = [
        row(name, ratios(through, alone, 100), "%", at_least(85)),
        row(f"bare loop, streams: {SLOTS}", alone, "tokens/s"),
        row(f"product, streams: {SLOTS}", through, "tokens/s"),
    ]
    notes = [
        "One thread each, on the first core; node, router and client on the others. "
        "Temperature 0.7, top-p 0.95; counted from when the last stream begins until the first one ends."
    ]
    os.sched_setaffinity(0, set(cores))
    return Found("product", "Through the whole product", rows, notes)


async def eight(fleet: Fleet, tokens: int) -> list[Heard]:
    """Eight different conversations at once."""
    bodies = [{"input": story(i), "temperature": 0.7, "top_p": 0.95, "seed": i} for i in range(SLOTS)]
    return await asyncio.gather(*(answered(fleet, max_output_tokens=tokens, **body) for body in bodies))


def rate(streams: list[Heard]) -> float:
    """Tokens per second of all streams, while all of them were running."""
    begin, end = max(each.times_s[0] for each in streams), min(each.times_s[-1] for each in streams)
    if begin >= end:
        raise SystemExit("bench: the streams were never all running; ask for more tokens, or leave the machine alone.")
    return sum(begin < moment <= end for each in streams for moment in each.times_s) / (end - begin)
