"""How long until a lost node is noticed, and the pause that a person sees."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.bench.engine.rows import Found, Row, Scale, at_most, row, tell
from tests.bench.failover.rig import Move, Rig, first_ms, moved, rig, spread
from tests.e2e.processes import Node

EARLY, LATE = 16, 200
MODES: dict[str, dict[str, Any]] = {"exact": {"edgechat:exact": True}, "fast": {"edgechat:exact": False}}
KILL_MS, STOP_MS = 50.0, 1500.0
TIMES_TTFT, PLUS_MS = 1.2, 100.0
BOUND = "pause over (1.2 x warm time to first token + 100 ms)"
NOTES = [
    "Two nodes with one thread each, a router with its store in SQLite, SmolLM2-135M; prompts of about 330 tokens, "
    "no two alike, which both nodes have read before (warm) or not (cold). The parent is killed after so many pieces "
    "of text; the pause is between the last piece before and the first after.",
    "The other node is asked: from the signal until the client is told so (`edgechat:node`), so the router's way to "
    "the client is counted too.",
    "Where a pause comes from: noticing; then, on the other node, the prompt's last block (all of the prompt when "
    "cold) and the ids that were said. `exact` computes those one after another, each as long as the first time; "
    "`fast` reads them like a prompt, so it is also held against a prompt that is so much longer. With the default "
    "`engine.failover_exact_s = 0.1` an answer goes on exactly if that adds less than a tenth of a second, or if it "
    "asks for `edgechat:exact` or names a seed: else fast, after 16 ids and after 200.",
]


class Warm(NamedTuple):
    """ttft_ms, longer_ms: of the node that took over, for the prompt and for one with as many tokens more as were
    said, its beginning known in both cases."""

    move: Move
    ttft_ms: float
    longer_ms: float


def measure(scale: Scale) -> Found:
    """Warm pauses of both modes and positions in turn; then cold ones; then other ways to be lost."""
    with rig() as made:
        return asyncio.run(_measure(made, scale))


async def _measure(made: Rig, scale: Scale) -> Found:
    warm: dict[tuple[str, int], list[Warm]] = {(mode, ids): [] for mode in MODES for ids in (EARLY, LATE)}
    for number in range(scale(10, 1)):
        tell(f"round {number + 1}")
        for (mode, ids), seen in warm.items():
            seen.append(await _warm(made, mode, ids))
    rows: list[Row] = []
    for (mode, ids), seen in warm.items():
        rows += _rows(f"{mode}, after {ids} ids", seen)
    late = warm["fast", LATE]
    rows.append(
        row(f"time to first token of a prompt with {LATE} tokens more", [each.longer_ms for each in late], "ms")
    )
    ratios = [_over(each.move, each.longer_ms) for each in late]
    rows += spread(f"pause over (1.2 x that + 100 ms), fast, after {LATE} ids", ratios, "x", at_most(1.0), 2)
    decided = [_over(each.move, each.ttft_ms) for each in (*warm["fast", EARLY], *late)]
    rows += spread(f"{BOUND}, as `failover_exact_s = 0.1` decides", decided, "x", at_most(1.0), 2)
    every = [each.move for seen in warm.values() for each in seen]
    rows.append(row("one id, while it was undisturbed", [move.step_ms for move in every], "ms"))
    rows += await _cold(made, scale)
    asked = "until the other node is asked"
    rows += spread(f"kill -9 of the parent, {asked}", [move.detected_ms for move in every], "ms", at_most(KILL_MS))
    for what, strike, target in (
        ("kill -9 of the engine", kill_engine, KILL_MS),
        ("SIGSTOP of the parent", stop_parent, STOP_MS),
        ("SIGSTOP of the engine", stop_engine, STOP_MS),
    ):
        found = [(await _struck(made, strike)).detected_ms for _ in range(scale(4, 1))]
        rows += spread(f"{what}, {asked}", found, "ms", at_most(target))
    return Found("kills", "A node is lost under an answer", rows, NOTES)


def _rows(what: str, seen: list[Warm]) -> list[Row]:
    """A pause, what it is held against, and its parts."""
    return [
        *spread(f"pause, {what}", [each.move.pause_ms for each in seen], "ms"),
        row(f"of it until the other node is asked, {what}", [each.move.detected_ms for each in seen], "ms"),
        row(f"of it until that one goes on, {what}", [each.move.to_first_ms for each in seen], "ms"),
        row(f"warm time to first token on that node, {what}", [each.ttft_ms for each in seen], "ms"),
        *spread(f"{BOUND}, {what}", [_over(each.move, each.ttft_ms) for each in seen], "x", at_most(1.0), 2),
    ]


async def _warm(made: Rig, mode: str, ids: int) -> Warm:
    """A kill, and what the node that took over needed just before for the same prompt and for a longer one."""
    text = made.prompt()
    ttft_ms: dict[str, float] = {}
    longer_ms: dict[str, float] = {}
    for name, fleet in made.alone.items():
        await first_ms(fleet, text)
        ttft_ms[name] = await first_ms(fleet, text, known=True)
        longer_ms[name] = await first_ms(fleet, text + " river" * ids, known=True)
    move = await moved(made, kill_parent, text, ids, **MODES[mode])
    made.mend()
    return Warm(move, ttft_ms[move.nodes[1]], longer_ms[move.nodes[1]])


async def _cold(made: Rig, scale: Scale) -> list[Row]:
    """The other node has read nothing of it; its time to first token is that of another prompt as long."""
    pauses: dict[str, list[float]] = {mode: [] for mode in MODES}
    over: dict[str, list[float]] = {mode: [] for mode in MODES}
    ttft_ms: list[float] = []
    for _ in range(scale(3, 1)):
        for mode, fields in MODES.items():
            alone = {name: await first_ms(fleet, made.prompt(), known=False) for name, fleet in made.alone.items()}
            move = await moved(made, kill_parent, made.prompt(), EARLY, **fields)
            made.mend()
            ttft_ms.append(alone[move.nodes[1]])
            pauses[mode].append(move.pause_ms)
            over[mode].append(_over(move, ttft_ms[-1]))
    rows = [row("time to first token, cold", ttft_ms, "ms")]
    for mode in MODES:
        rows.append(row(f"pause, {mode}, after {EARLY} ids, cold", pauses[mode], "ms"))
        rows.append(
            row(f"pause over (1.2 x cold time to first token + 100 ms), {mode}, cold", over[mode], "x", None, 2)
        )
    return rows


async def _struck(made: Rig, strike: Callable[[Node], None]) -> Move:
    move = await moved(made, strike, made.prompt(), EARLY, **MODES["fast"])
    made.mend()
    return move


def _over(move: Move, ttft_ms: float) -> float:
    return move.pause_ms / (TIMES_TTFT * ttft_ms + PLUS_MS)


def kill_parent(node: Node) -> None:
    os.kill(node.pid, signal.SIGKILL)


def kill_engine(node: Node) -> None:
    node.kill_engine()


def stop_parent(node: Node) -> None:
    os.kill(node.pid, signal.SIGSTOP)


def stop_engine(node: Node) -> None:
    node.engine().suspend()
