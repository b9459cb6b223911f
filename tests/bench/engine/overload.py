"""Twice as many questions as can be answered: how much of the peak is still answered, and how the others are told."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import websockets

from tests.bench.bare_loop import SLOTS
from tests.bench.engine.client import Heard, ask, connection, product
from tests.bench.engine.loops import endless, story
from tests.bench.engine.rows import Found, Row, Scale, at_least, ratios, row, tell
from tests.e2e.processes import Fleet

ANSWER_TOKENS = 48
MAX_WAITING = 16
OVERLOAD = 2.0


@dataclass
class Load:
    """What came of one load. from_s, until_s: the stretch that counts, after everything has filled up."""

    from_s: float
    until_s: float
    heard: list[Heard] = field(default_factory=list)

    @property
    def goodput_tokens_s(self) -> float:
        """Output tokens of completed answers per second."""
        return sum(each.output_tokens for each in self.counted if not each.refused) / (self.until_s - self.from_s)

    @property
    def counted(self) -> list[Heard]:
        return [each for each in self.heard if self.from_s <= each.ended_s < self.until_s]

    @property
    def refused_share(self) -> float:
        return sum(bool(each.refused) for each in self.counted) / max(1, len(self.counted))

    @property
    def refusal_ms(self) -> list[float]:
        return [1e3 * (each.ended_s - each.asked_s) for each in self.counted if each.refused]

    @property
    def gap_ms(self) -> list[float]:
        """Mean time between the tokens of each answer."""
        done = [each for each in self.counted if len(each.times_s) > 1]
        return [1e3 * (each.times_s[-1] - each.times_s[0]) / (len(each.times_s) - 1) for each in done]


class Connections:
    """Sockets that are free again are used again, so that refusals do not cost a handshake each."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._free: list[websockets.ClientConnection] = []
        self._asked = 0

    async def ask(self) -> Heard:
        socket = self._free.pop() if self._free else await connection(self._fleet)
        self._asked += 1
        text = f"Question {self._asked}. {story(self._asked)}"
        heard = await ask(socket, input=text, max_output_tokens=ANSWER_TOKENS, seed=self._asked)
        self._free.append(socket)
        return heard

    async def close(self) -> None:
        for socket in self._free:
            await socket.close()


def measure(scale: Scale) -> Found:
    """A peak and an overload at twice that peak, in turn."""
    return asyncio.run(_measure(scale))


async def _measure(scale: Scale) -> Found:
    peaks: list[Load] = []
    floods: list[Load] = []
    folder = endless()
    with product(folder, {"EDGE__ENGINE__MAX_WAITING": str(MAX_WAITING)}) as fleet:
        connections = Connections(fleet)
        await closed_loop(connections, 0.0, 2.0)  # warm
        for number in range(scale(3, 1)):
            tell(f"pair {number + 1}")
            peak = await closed_loop(connections, 3.0, scale(14, 6))
            rate = OVERLOAD * peak.goodput_tokens_s / ANSWER_TOKENS
            peaks.append(peak)
            floods.append(await open_loop(connections, rate, 8.0, scale(16, 8)))
        await connections.close()
    notes = [
        f"Answers of {ANSWER_TOKENS} tokens. Peak: {SLOTS} clients, each with its next question as soon as it has an "
        f"answer. Overload: questions at {OVERLOAD:g} times the rate that the peak answered, whether or not they are "
        f"taken (max_waiting = {MAX_WAITING}); nobody asks again. Counted once the waiting line is full."
    ]
    return Found("overload", f"Overload at {OVERLOAD:g}x capacity", _rows(peaks, floods), notes)


def _rows(peaks: list[Load], floods: list[Load]) -> list[Row]:
    best, kept = ([each.goodput_tokens_s for each in loads] for loads in (peaks, floods))
    return [
        row("goodput over peak", ratios(kept, best, 100), "%", at_least(90)),
        row("peak", best, "tokens/s"),
        row("goodput at overload", kept, "tokens/s"),
        row("refused", [100 * each.refused_share for each in floods], "%"),
        row("time to be refused", [value for each in floods for value in each.refusal_ms], "ms"),
        row("time between tokens, peak", [value for each in peaks for value in each.gap_ms], "ms"),
        row("time between tokens, overload", [value for each in floods for value in each.gap_ms], "ms"),
    ]


async def closed_loop(connections: Connections, warm_s: float, length_s: float) -> Load:
    """As many clients as slots, each asking again at once."""
    began = time.perf_counter()
    load = Load(began + warm_s, began + warm_s + length_s)

    async def client() -> None:
        while time.perf_counter() < load.until_s:
            heard = await connections.ask()
            if heard.refused:
                raise SystemExit(f"bench: the router answered {heard.refused}")
            load.heard.append(heard)

    await asyncio.gather(*(client() for _ in range(SLOTS)))
    return load


async def open_loop(connections: Connections, questions_s: float, warm_s: float, length_s: float) -> Load:
    """Questions at a steady rate; returns when the last one was answered or refused."""
    began = time.perf_counter()
    load = Load(began + warm_s, began + warm_s + length_s)

    async def client() -> None:
        load.heard.append(await connections.ask())

    asked: list[asyncio.Task[None]] = []
    while (now_s := time.perf_counter()) < load.until_s:
        due = int((now_s - began) * questions_s) + 1
        asked += [asyncio.create_task(client()) for _ in range(due - len(asked))]
        await asyncio.sleep(max(0.0, began + due / questions_s - time.perf_counter()))
    await asyncio.gather(*asked)
    return load
