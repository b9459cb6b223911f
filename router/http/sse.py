"""Server-sent events: one response or completion as a stream over plain HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
from aiohttp import web

from core.stream import Event, Failure
from router.api.errors import error_event, from_failure
from router.fleet import Node
from router.http.context import Context, request_id
from router.http.outbox import Outbox
from router.journal import StoredResponse

DONE = b"data: [DONE]\n\n"
COMMENT = b": \n\n"
"""Says nothing, but that we live; no client takes it for an event."""


def named(event: Event) -> bytes:
    """An event of the Responses dialect, which names its type twice."""
    type_: str = event["type"]
    return b"event: " + type_.encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


def unnamed(chunk: Event) -> bytes:
    """A chunk of the chat completions dialect."""
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


class SseReader:
    """Writes what `translate` makes of events into an outbox.

    begun: set at the first byte, or at the end if there is none; `end` or `refused` then says how it ended.
    refused after events: there is no end here, the response may go on elsewhere.
    """

    def __init__(self, outbox: Outbox, translate: Callable[[Event], bytes]) -> None:
        self.node = ""
        self.begun = asyncio.Event()
        self.wrote = False
        self.end: StoredResponse | None = None
        self.refused: Failure | None = None
        self._outbox = outbox
        self._translate = translate

    def on_events(self, events: list[Event]) -> None:
        if data := b"".join(map(self._translate, events)):
            self._outbox.put(data)
            self.wrote = True
            self.begun.set()

    def on_serving(self, node: Node) -> None:
        self.node = self.node or node.hello.name

    def on_reading(self, computed: int, total: int) -> None:
        """Nothing to show: extensions are for the WebSocket mode."""

    def on_end(self, response: StoredResponse) -> None:
        self.end = response
        self.begun.set()
        self._outbox.finish()

    def on_refused(self, failure: Failure) -> None:
        self.refused = failure
        self.begun.set()
        self._outbox.finish()

    async def begin(self) -> None:
        """Wait until there is something to say; raises EdgechatError while that can still be an honest HTTP status."""
        await self.begun.wait()
        failure = self.refused or (self.end.end.error if self.end else None)
        if failure is not None and not self.wrote:
            raise from_failure(failure)


def stopped(reader: SseReader) -> bytes:
    """The last event of a stream of the Responses dialect: none after an end, an `error` where none follows."""
    return b"" if reader.refused is None else named(error_event(from_failure(reader.refused)))


@asynccontextmanager
async def outbox_for(context: Context, request: web.Request) -> AsyncIterator[Outbox]:
    """An outbox that is watched by the slow-reader timer for as long as the block runs."""
    outbox = context.new_outbox(request)
    try:
        yield outbox
    finally:
        context.outboxes.discard(outbox)


async def send(
    request: web.Request, reader: SseReader, outbox: Outbox, last: Callable[[], bytes]
) -> web.StreamResponse:
    """Head, then everything the outbox is given, then `last()`."""
    headers = {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
        "x-content-type-options": "nosniff",
        "x-request-id": request_id(request),
    }
    if reader.node:
        headers["x-edge-node"] = reader.node
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)

    # A client that goes away ends its own stream only; the handler's `finally` tells the session.
    with contextlib.suppress(ConnectionError):
        if await outbox.drain(response.write):
            if closing := last():
                await response.write(closing)
            await response.write_eof()
    return response
