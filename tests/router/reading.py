"""Answers that a test speaks word by word, and clients that read them byte by byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import ClientResponse, ClientSession

from core.frames import Generate, Started
from router.config import Config, RouterSection
from router.registry import RouterAddress
from tests.fake_store import FakeDatabase
from tests.router.fakes import BODY, CONFIG, FakeNode, FakeRouter, done, running_router, tokens, with_key, words

TEXTS = ("Rhine", ", Elbe", ", Oder", ".")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


class Spoken:
    """One answer of a node; `say` goes on with it."""

    def __init__(self, node: FakeNode, frame: Generate, *texts: str) -> None:
        self.node = node
        self.frame = frame
        self._ids, self._deltas = words(*texts)
        self._said = len(frame.output_ids)
        node.say(Started(frame.stream, frame.epoch, 5, 2))

    @property
    def id(self) -> str:
        return self.frame.stream

    def say(self, count: int = 1) -> None:
        """The next `count` words."""
        for _ in range(count):
            seq = self._said
            row = tokens(self.id, self.frame.epoch, seq, [self._ids[seq]], [self._deltas[seq]])
            self.node.say(row)
            self._said += 1

    def finish(self) -> None:
        """All that is left, and the end."""
        self.say(len(self._ids) - self._said)
        self.node.say(done(self.frame, len(self._ids)))


class Stream:
    """A stream of server-sent events, event by event; `text` is each as it came."""

    def __init__(self, answer: ClientResponse) -> None:
        self.answer = answer
        self._held = b""

    async def next(self) -> bytes | None:
        """The next event's bytes, without what is no event; None at an orderly end."""
        async with asyncio.timeout(10):
            while True:
                event, separator, rest = self._held.partition(b"\n\n")
                if separator:
                    self._held = rest
                    if event.startswith(b":"):
                        continue
                    return event
                piece = await self.answer.content.readany()
                if not piece:
                    assert not self._held
                    return None
                self._held += piece

    async def take(self, count: int) -> list[bytes]:
        taken = [await self.next() for _ in range(count)]
        assert None not in taken
        return [event for event in taken if event is not None]

    async def rest(self) -> list[bytes]:
        """All up to an orderly end."""
        events: list[bytes] = []
        while (event := await self.next()) is not None:
            events.append(event)
        return events


def data(event: bytes) -> dict[str, Any]:
    """What an event says."""
    said: dict[str, Any] = json.loads(event.partition(b"data: ")[2])
    return said


@asynccontextmanager
async def asking(
    router: FakeRouter, http: ClientSession, *texts: str, **fields: Any
) -> AsyncIterator[tuple[Spoken, Stream]]:
    """A streamed request, and the answer that a node has begun to give; its first two events are out."""
    body = BODY | {"stream": True} | fields
    waiting = asyncio.create_task(http.post(f"{router.url}/v1/responses", json=body))
    node, frame = await router.links.generates.get()
    spoken = Spoken(node, frame, *(texts or TEXTS))
    async with await waiting as answer:
        yield spoken, Stream(answer)


async def whole(router: FakeRouter, http: ClientSession, *texts: str, **fields: Any) -> tuple[str, list[bytes]]:
    """A finished response: its id, and its events as they were first delivered."""
    async with asking(router, http, *texts, **fields) as (spoken, stream):
        spoken.finish()
        return spoken.id, await stream.rest()


def after(router: FakeRouter, response_id: str, starting_after: int | None = None) -> str:
    """The URL of a resumed stream."""
    query = "" if starting_after is None else f"&starting_after={starting_after}"
    return f"{router.url}/v1/responses/{response_id}?stream=true{query}"


@asynccontextmanager
async def routers(
    *names: str, database: FakeDatabase | None = None, config: Config = CONFIG
) -> AsyncIterator[list[FakeRouter]]:
    """Routers that know each other; each with a store of its own, unless they share a database."""
    opened: list[FakeRouter] = []
    managers = []
    try:
        for name in names:
            manager = running_router(msgspec.structs.replace(config, router=RouterSection(name=name)), database)
            opened.append(await manager.__aenter__())
            managers.append(manager)
        introduce(dict(zip(names, opened, strict=True)))
        yield opened
    finally:
        for manager in reversed(managers):
            await manager.__aexit__(None, None, None)


def introduce(named: dict[str, FakeRouter]) -> None:
    """Tell each router of the others."""
    for name, router in named.items():
        others = [RouterAddress(other, its.url) for other, its in named.items() if other != name]
        router.context.routers.set_addresses(others)


def client(name: str = "alice") -> ClientSession:
    return ClientSession(headers=with_key(name))
