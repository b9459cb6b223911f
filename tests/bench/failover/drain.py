"""The pause when a node is asked to stop while it answers."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from tests.bench.engine.rows import Found, Scale, row, tell
from tests.bench.failover.kills import EARLY, MODES
from tests.bench.failover.rig import Rig, first_ms, moved, rig, spread
from tests.e2e.processes import Node


def measure(scale: Scale) -> Found:
    """Both modes in turn; both nodes have read the prompt before."""
    with rig() as made:
        return asyncio.run(_measure(made, scale))


async def _measure(made: Rig, scale: Scale) -> Found:
    pauses: dict[str, list[float]] = {mode: [] for mode in MODES}
    asked: list[float] = []
    ends_s: list[float] = []
    for number in range(scale(4, 1)):
        tell(f"round {number + 1}")
        for mode, fields in MODES.items():
            text = made.prompt()
            for fleet in made.alone.values():
                await first_ms(fleet, text)
            move = await moved(made, ask_to_stop, text, EARLY, **fields)
            made.fleet.node(move.nodes[0]).wait_exit()
            ends_s.append(time.perf_counter() - move.struck_s)
            pauses[mode].append(move.pause_ms)
            asked.append(move.detected_ms)
            made.mend()
    rows = [each for mode in MODES for each in spread(f"pause, {mode}, after {EARLY} ids", pauses[mode], "ms")]
    rows.append(row("SIGTERM, until the other node is asked", asked, "ms"))
    rows.append(row("SIGTERM, until the node has ended (its `drain_s` was 600)", ends_s, "s", digits=2))
    notes = ["As above, warm; the node hands its answer over and ends when it has none left."]
    return Found("drain", "A node is asked to stop under an answer", rows, notes)


def ask_to_stop(node: Node) -> None:
    os.kill(node.pid, signal.SIGTERM)
