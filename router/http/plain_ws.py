"""The plain dialect over WebSocket: text in, reply out, one conversation per connection, nothing stored."""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from aiohttp import web

from core.conversation import Item
from core.errors import EdgechatError, NoNodeAvailable, Overloaded, RequestError
from core.stream import output_items
from router.api.shim import SUBPROTOCOL, parse_message, refusal, reply
from router.errors import ConnectionLimitReached
from router.http.context import Context, context_of, principal
from router.http.readers import Whole
from router.http.websocket import Peer, require_upgrade

log = logging.getLogger(__name__)


async def connect(request: web.Request) -> web.StreamResponse:
    """`GET /ws` with Upgrade."""
    require_upgrade(request)
    who = principal(request, "chat")
    context = context_of(request)
    life_min = context.config.limits.connection_life_s // 60
    peer = Peer(request, (SUBPROTOCOL,), lambda: refusal(ConnectionLimitReached(life_min)))
    connection = PlainConnection(context, who.tenant, peer)
    try:
        return await peer.run(connection.on_text, connection.on_binary)
    finally:
        await connection.leave()


class PlainConnection:
    """Answers in the order asked. Invariant: `_history` holds whole turns only, question and answer."""

    def __init__(self, context: Context, tenant: str, peer: Peer) -> None:
        self._context = context
        self._tenant = tenant
        self._peer = peer
        self._history: list[Item] = []
        self._waiting: deque[str] = deque()
        self._task: asyncio.Task[None] | None = None

    def on_text(self, text: str) -> None:
        most = self._context.config.limits.max_queued_per_connection
        if len(self._waiting) >= most:
            self._peer.send(refusal(Overloaded(f"{most} messages wait for an answer, which is the limit; wait.")))
            return
        self._waiting.append(text)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer_all(), name=f"plain {self._peer.id}")

    def on_binary(self) -> None:
        self._peer.send(refusal(RequestError('Binary frames are not spoken here; send {"text": "..."} as text.')))

    async def leave(self) -> None:
        """The client is gone: what is being answered loses its reader."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _answer_all(self) -> None:
        while self._waiting:
            try:
                self._peer.send(reply(await self._answer(self._waiting.popleft())))
            except EdgechatError as error:
                self._context.metrics.refusals.labels(error.code).inc()
                self._peer.send(refusal(error))
            except Exception:
                log.exception("a message on %s could not be answered", self._peer.id)
                sentence = f"The router made a mistake; report the connection id {self._peer.id}."
                self._peer.send(refusal(EdgechatError(sentence)))

    async def _answer(self, text: str) -> str:
        defaults = self._context.config.defaults
        call = parse_message(text, list(self._history), self._model(), defaults)
        reader = Whole()
        running = await self._context.dispatcher.begin(self._tenant, call, reader)
        try:
            response = await reader.stored()
        finally:
            self._context.sessions.leave(running, reader)
        said = output_items(response.record.id, response.record.release, response.ids, response.deltas)
        self._history += [*call.request.input, *said]
        return "".join(item.text for item in said if item.kind == "message")

    def _model(self) -> str:
        """The model of a client that names none."""
        configured = self._context.config.defaults.model
        served = self._context.fleet.served(self._context.now().mono_s)
        if not configured and not served:
            raise NoNodeAvailable("the default model")
        return configured or served[0]
