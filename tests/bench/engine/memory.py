"""Memory of the engine process after 100 and after 1,000 conversations, its caches full."""

from __future__ import annotations

import asyncio

from tests.bench.bare_loop import SLOTS
from tests.bench.engine.client import ask, connection, engine_of, product
from tests.bench.engine.loops import endless, story
from tests.bench.engine.rows import Found, Row, Scale, at_most, row, tell
from tests.e2e.processes import Fleet

KV_CACHE_BYTES = 48 * 1024 * 1024
"""Some sixteen prefix blocks of SmolLM2: full after a dozen conversations."""
CONTEXT_TOKENS = 512
ANSWER_TOKENS = 4
MIB = 1 << 20


def measure(scale: Scale) -> Found:
    """One life of one engine."""
    edge = {"EDGE__ENGINE__KV_CACHE_BYTES": str(KV_CACHE_BYTES), "EDGE__ENGINE__CONTEXT_TOKENS": str(CONTEXT_TOKENS)}
    every = scale(100, 10)
    with product(endless(), edge) as fleet:
        mib: list[float] = []
        for number in range(10):
            asyncio.run(converse(fleet, number * every, every))
            mib.append(engine_of(fleet).memory_info().rss / MIB)
            tell(f"{(number + 1) * every} conversations: {mib[-1]:.1f} MiB")
    growth = [100 * (later / mib[0] - 1) for later in mib[1:]]
    rows = [
        Row(
            f"more after {10 * every:,} conversations than after {every} (range: all in between)",
            growth[-1],
            min(growth),
            max(growth),
            "%",
            at_most(3.0),
            2,
        ),
        row(f"after {every} conversations", mib[:1], "MiB"),
        row(f"after {10 * every:,} conversations", mib[-1:], "MiB"),
    ]
    tell(rows[0].text())
    notes = [
        f"Resident set of the engine process; {SLOTS} clients, prompts of 40 to 250 tokens, {ANSWER_TOKENS} tokens "
        f"answered, kv_cache_bytes = {KV_CACHE_BYTES // MIB} MiB, which is full before the first figure."
    ]
    return Found("memory", "Memory", rows, notes)


async def converse(fleet: Fleet, first: int, count: int) -> None:
    """So many conversations of one turn, eight at a time, all different."""
    numbers = iter(range(first, first + count))

    async def client() -> None:
        async with connection(fleet) as socket:
            for number in numbers:
                text = f"{number}: {story(number)} {'And so on, and on. ' * (4 * (number % 10))}"
                heard = await ask(socket, input=text, max_output_tokens=ANSWER_TOKENS)
                if heard.refused:
                    raise SystemExit(f"bench: the router answered {heard.refused}")

    await asyncio.gather(*(client() for _ in range(SLOTS)))
