"""Eight different prompts together: what the engine adds to the graph, and what a batch gains."""

from __future__ import annotations

from edge_node.engine.engine import EngineLimits
from tests.bench.bare_loop import SLOTS, BareLoop, open_runner, read_manifest
from tests.bench.engine.loops import (
    DEFAULT_SAMPLING,
    GREEDY,
    EngineLoop,
    Shifted,
    all_writing,
    endless,
    in_blocks,
    in_turn,
    request,
    speech_of,
    story,
)
from tests.bench.engine.rows import Found, Scale, at_least, ratios, row
from tests.bench.report import THREADS

CONTEXT_TOKENS = 1024
BLOCK_STEPS = 8


def measure(scale: Scale) -> Found:
    """Steps alternate between two loops in 16 slots of one runner."""
    folder = endless()
    manifest = read_manifest(folder)
    speech = speech_of(folder, manifest)
    runner = open_runner(folder, THREADS, 2 * SLOTS, CONTEXT_TOKENS)
    limits = EngineLimits(slots=SLOTS, context_tokens=CONTEXT_TOKENS, max_waiting=0)
    steps = scale(160, 16)

    def engine(streams: int, first_slot: int, sampling: object) -> EngineLoop:
        chosen = DEFAULT_SAMPLING if sampling is DEFAULT_SAMPLING else GREEDY
        loop = EngineLoop(Shifted(runner, first_slot), manifest, speech, limits)
        for index in range(streams):
            loop.submit(request(manifest, str(index), story(index), CONTEXT_TOKENS, chosen))
        loop.until(all_writing(list(loop.answers.values())))
        return loop

    rows = []
    for streams, aim in ((SLOTS, at_least(95.0)), (1, None)):
        for name, sampling in (("temperature 0.7, top-p 0.95", DEFAULT_SAMPLING), ("greedy", GREEDY)):
            ours = engine(streams, 0, sampling)
            prompts = [
                speech.lay_out(request(manifest, "", story(index), 1).items, manifest.release).ids
                + ours.answers[str(index)].ids
                for index in range(streams)
            ]
            bare = BareLoop(runner, prompts, SLOTS)
            taken = in_turn(steps, ours.step, bare.step)
            alone, with_engine = (in_blocks(taken[at], BLOCK_STEPS) for at in (1, 0))
            rows.append(
                row(f"engine over bare loop, streams: {streams}, {name}", ratios(alone, with_engine, 100), "%", aim)
            )
            rates = [streams * BLOCK_STEPS / seconds for seconds in with_engine]
            rows.append(row(f"engine, streams: {streams}, {name}", rates, "tokens/s"))
    together, alone_loop = engine(SLOTS, 0, DEFAULT_SAMPLING), engine(1, SLOTS, DEFAULT_SAMPLING)
    taken = in_turn(steps, together.step, alone_loop.step)
    gains = ratios(in_blocks(taken[1], BLOCK_STEPS), in_blocks(taken[0], BLOCK_STEPS), SLOTS)
    rows.append(row(f"engine, {SLOTS} streams over one", gains, "x", at_least(3.0), 2))
    notes = [
        f"{THREADS} threads. The bare loop takes the best id of each row and nothing else, at the same "
        f"positions of the same eight conversations; steps alternate, each value is {BLOCK_STEPS} steps of each."
    ]
    return Found("batch", "Eight different prompts together", rows, notes)
