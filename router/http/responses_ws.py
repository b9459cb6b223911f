"""The Responses dialect over WebSocket: the primary protocol.

One response at a time per lane; a lane is a `stream_id`, or its absence. Every lane with something to
do has one task; what is said to the client goes through one outbox.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterable

import msgspec
from aiohttp import web

from core.errors import EdgechatError, Overloaded, RequestError, ResponseNotFound
from core.stream import Event, Failure
from router.api.call import Call
from router.api.errors import error_event, from_failure
from router.api.responses import (
    Cancel,
    Create,
    Resume,
    node_event,
    on_lane,
    parse_event,
    progress_event,
    stream_id_of,
)
from router.auth import subprotocols
from router.errors import ConnectionLimitReached, Draining
from router.finder import Elsewhere, Found
from router.fleet import Node
from router.http.context import Context, context_of, principal
from router.http.kept import Kept
from router.http.responses_http import replay_after
from router.http.websocket import Peer, require_upgrade
from router.journal import StoredResponse
from router.sessions import Running

log = logging.getLogger(__name__)

JSON_SUBPROTOCOL = "responses.v1.json"
EXTENSIONS_SUBPROTOCOL = "edgechat.ext.v1"


async def connect(request: web.Request) -> web.StreamResponse:
    """`GET /v1/responses` with Upgrade."""
    require_upgrade(request)
    who = principal(request, "chat")
    offered = subprotocols(request.headers.get("Sec-WebSocket-Protocol"))
    context = context_of(request)
    life_min = context.config.limits.connection_life_s // 60
    peer = Peer(request, (JSON_SUBPROTOCOL,), lambda: error_event(ConnectionLimitReached(life_min)))
    connection = ResponsesConnection(context, who.tenant, peer, extensions=EXTENSIONS_SUBPROTOCOL in offered)
    try:
        return await peer.run(connection.on_text, connection.on_binary)
    finally:
        await connection.leave()


class ResponsesConnection:
    """One client's lanes, and the unstored responses that only this connection remembers.

    Invariant: a lane is in `_lanes` exactly while its task runs; at most `max_queued_per_connection` calls wait.
    """

    def __init__(self, context: Context, tenant: str, peer: Peer, *, extensions: bool) -> None:
        self.peer = peer
        self.extensions = extensions
        self._context = context
        self._tenant = tenant
        self._lanes: dict[str | None, deque[Call | Resume]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._kept = Kept()

    def on_text(self, text: str) -> None:
        try:
            match parse_event(text, self._context.config.defaults):
                case Create(call):
                    self._queue(msgspec.structs.replace(call, arrived_at_s=self._context.now().mono_s))
                case Resume() as resume:
                    self._queue(resume)
                case Cancel(response_id):
                    self._cancel(response_id)
        except EdgechatError as error:
            self.refuse(error, stream_id_of(text))

    def on_binary(self) -> None:
        self.refuse(RequestError("Binary frames are not spoken here; send JSON in text frames."), None)

    def keep(self, response: StoredResponse) -> None:
        """Remember an unstored response for `previous_response_id`."""
        self._kept.add(response)

    async def leave(self) -> None:
        """The client is gone: its responses lose their reader."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _queue(self, call: Call | Resume) -> None:
        limits = self._context.config.limits
        lane = self._lanes.get(call.stream_id)
        if lane is not None:
            if sum(map(len, self._lanes.values())) >= limits.max_queued_per_connection:
                most = limits.max_queued_per_connection
                raise Overloaded(f"{most} requests wait on this connection, which is its limit; wait for an answer.")
            lane.append(call)
            return
        if len(self._lanes) >= limits.max_lanes_per_connection:
            most = limits.max_lanes_per_connection
            raise Overloaded(f"{most} lanes are busy on this connection, which is its limit; wait for an answer.")
        self._lanes[call.stream_id] = lane = deque([call])
        self._spawn(self._run_lane(call.stream_id, lane), "lane")

    def _spawn(self, work: Coroutine[None, None, None], what: str) -> None:
        task = asyncio.create_task(work, name=f"{what} of {self.peer.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_lane(self, stream_id: str | None, calls: deque[Call | Resume]) -> None:
        try:
            while calls:
                call = calls.popleft()
                answer = self._answer(call) if isinstance(call, Call) else self._resume(call)
                await self._carefully(answer, stream_id)
        finally:
            del self._lanes[stream_id]

    async def _carefully(self, work: Awaitable[None], stream_id: str | None) -> None:
        """Whatever goes wrong is said on its lane."""
        try:
            await work
        except EdgechatError as error:
            self.refuse(error, stream_id)
        except Exception:
            log.exception("a request on %s could not be answered", self.peer.id)
            sentence = f"The router made a mistake; report the connection id {self.peer.id}."
            self.refuse(EdgechatError(sentence), stream_id)

    async def _answer(self, call: Call) -> None:
        reader = _LaneReader(self, call.stream_id)
        running = await self._context.dispatcher.begin(self._tenant, call, reader, self._kept)
        await self._read(running, reader)

    async def _read(self, running: Running, reader: _LaneReader) -> None:
        try:
            await reader.over.wait()
        finally:
            self._context.sessions.leave(running, reader)

    # -- responses that were begun on another connection ---------------------------------------

    async def _resume(self, resume: Resume) -> None:
        after = resume.starting_after

        async def read() -> None:
            nonlocal after
            found = await self._find(resume.response_id)
            match found:
                case Running():
                    reader = _LaneReader(self, resume.stream_id, resume.response_id)
                    self._context.sessions.join(found, reader, after)
                    self._context.metrics.resumed.inc()
                    await self._read(found, reader)
                case StoredResponse():
                    self.say(replay_after(found, after), resume.stream_id)
                    self._context.metrics.resumed.inc()
                case Elsewhere(router):
                    async for event in self._passed_on(router, resume, after):
                        self.say([event], resume.stream_id)
                        after = event["sequence_number"]

        await self._context.finder.patiently(read)

    async def _passed_on(self, router: str, resume: Resume, after: int) -> AsyncIterator[Event]:
        """What another router says, no faster than it is read here."""
        async with self._context.routers.events(router, self._tenant, resume.response_id, after) as following:
            if following.node and self.extensions:
                region = self._region_of(following.node)
                self.peer.send(node_event(resume.response_id, following.node, region, resume.stream_id))
            async for event in following.events:
                yield event
                await self.peer.caught_up()

    def _region_of(self, node: str) -> str:
        """Another router names a node only; where it is we know if it is linked to us as well."""
        nodes = self._context.fleet.nodes.values()
        return next((known.hello.region for known in nodes if known.hello.name == node), "")

    async def _find(self, response_id: str) -> Found:
        if self._context.dispatcher.draining:
            raise Draining
        return await self._context.finder.find(self._tenant, response_id)

    def _cancel(self, response_id: str) -> None:
        if running := self._context.sessions.find(self._tenant, response_id):
            self._context.sessions.cancel(running)
            return
        limits = self._context.config.limits
        if len(self._tasks) >= limits.max_lanes_per_connection + limits.max_queued_per_connection:
            raise Overloaded("Too many responses are being looked for on this connection; wait.")
        self._spawn(self._carefully(self._cancel_found(response_id), None), "cancel")

    async def _cancel_found(self, response_id: str) -> None:
        """One that runs elsewhere, or that nobody held; what has ended cannot be cancelled."""
        try:
            match await self._find(response_id):
                case Running() as running:
                    self._context.sessions.cancel(running)
                case StoredResponse():
                    raise ResponseNotFound(response_id)
                case Elsewhere(router):
                    await self._context.routers.cancel(router, self._tenant, response_id)
        except EdgechatError as error:
            # Whatever it is, it is no answer to what the client has asked since.
            error.param = "response_id"
            raise

    # -- what the client is told ---------------------------------------------------------------

    def say(self, events: Iterable[Event], stream_id: str | None) -> None:
        """Events of a response, in one go."""
        self.peer.send(*(on_lane(event, stream_id) for event in events))

    def refuse(self, error: EdgechatError, stream_id: str | None) -> None:
        """Say an error that belongs to no response."""
        self._context.metrics.refusals.labels(error.code).inc()
        self.peer.send(error_event(error, stream_id))


class _LaneReader:
    """Says a response's events on its lane; extension events only to clients that asked for them."""

    def __init__(self, connection: ResponsesConnection, stream_id: str | None, response_id: str = "") -> None:
        """response_id: "" = the first event says it."""
        self.over = asyncio.Event()
        self._connection = connection
        self._stream_id = stream_id
        self._response_id = response_id

    def on_events(self, events: list[Event]) -> None:
        if not self._response_id and events:
            self._response_id = events[0]["response"]["id"]
        self._connection.say(events, self._stream_id)

    def on_serving(self, node: Node) -> None:
        if self._connection.extensions:
            event = node_event(self._response_id, node.hello.name, node.hello.region, self._stream_id)
            self._connection.peer.send(event)

    def on_reading(self, computed: int, total: int) -> None:
        if self._connection.extensions:
            self._connection.peer.send(progress_event(self._response_id, computed, total, self._stream_id))

    def on_end(self, response: StoredResponse) -> None:
        if not response.record.request.store:
            self._connection.keep(response)
        self.over.set()

    def on_refused(self, failure: Failure) -> None:
        self._connection.refuse(from_failure(failure), self._stream_id)
        self.over.set()
