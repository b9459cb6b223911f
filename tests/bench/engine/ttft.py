"""Time to the first token of a conversation's next turn, against one of the same length that was never seen."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from tests.bench.engine.client import answered, product
from tests.bench.engine.loops import TOPICS, endless
from tests.bench.engine.rows import Found, Scale, at_most, ratios, row, tell
from tests.e2e.processes import Fleet

HISTORY_TOKENS = 1500
TURN_WORDS = 180
ANSWER_TOKENS = 48
# What an idle node needs to re-read the answers of a conversation, and the next person to type.
PAUSE_S = 2.0
QUESTION = "And what happened then, in one sentence?"


def measure(scale: Scale) -> Found:
    """Pairs in turn on one fleet."""
    cached_ms: list[float] = []
    cold_ms: list[float] = []
    shares: list[float] = []
    lengths: list[float] = []
    with product(endless()) as fleet:
        asyncio.run(answered(fleet, input="Hi", max_output_tokens=2))
        for number in range(scale(6, 1)):
            tell(f"pair {number + 1}")
            asyncio.run(pair(fleet, number, cached_ms, cold_ms, shares, lengths))
    rows = [
        row("cached over uncached", ratios(cached_ms, cold_ms, 100), "%", at_most(8)),
        row("next turn, cached", cached_ms, "ms"),
        row("same length, never seen", cold_ms, "ms"),
        row("prompt of the next turn", lengths, "tokens", digits=0),
        row("of it from the prefix store", shares, "%"),
    ]
    notes = [
        f"Turns of about {TURN_WORDS} words and {ANSWER_TOKENS} answered tokens through `previous_response_id`, "
        f"{PAUSE_S:g} s of silence before the one that is measured."
    ]
    return Found("ttft", "The next turn of a long conversation", rows, notes)


async def pair(
    fleet: Fleet, number: int, cached_ms: list[float], cold_ms: list[float], shares: list[float], lengths: list[float]
) -> None:
    """A conversation's next turn, and the same history with another beginning, sent whole."""
    history: list[dict[str, Any]] = []
    previous: str | None = None
    tokens, turn = 0, 0
    while tokens < HISTORY_TOKENS:
        text = words(number, turn)
        heard = await answered(
            fleet, input=text, previous_response_id=previous, store=True, max_output_tokens=ANSWER_TOKENS, temperature=0
        )
        previous, turn = heard.response["id"], turn + 1
        tokens = heard.input_tokens + heard.output_tokens
        history += [message("user", text), message("assistant", spoken(heard.response))]
    await asyncio.to_thread(time.sleep, PAUSE_S)
    nxt = await answered(
        fleet, input=QUESTION, previous_response_id=previous, store=True, max_output_tokens=4, temperature=0
    )
    unseen = [message("user", f"Number {number}. {history[0]['content']}"), *history[1:], message("user", QUESTION)]
    cold = await answered(fleet, input=unseen, max_output_tokens=4, temperature=0)
    if cold.cached_tokens >= 64:
        raise SystemExit(f"bench: {cold.cached_tokens} tokens of the unseen conversation were in the cache.")
    cached_ms.append(1e3 * nxt.first_id_s)
    cold_ms.append(1e3 * cold.first_id_s)
    shares.append(100 * nxt.cached_tokens / nxt.input_tokens)
    lengths.append(nxt.input_tokens)


def words(number: int, turn: int) -> str:
    """Text that no other conversation or turn begins with."""
    topic = TOPICS[(number + turn) % len(TOPICS)]
    told = f"Conversation {number}, part {turn}: remember what I know about {topic}. "
    return " ".join((told + f"It was told in {1900 + 7 * turn + number} and again later. " * 40).split()[:TURN_WORDS])


def message(role: str, text: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": text}


def spoken(response: dict[str, Any]) -> str:
    """The text of a finished response."""
    parts = [part for item in response["output"] for part in item.get("content", [])]
    return "".join(part.get("text", "") for part in parts)
