"""A router of the tests' own: serves the page as the real one does and speaks the WebSocket mode by script.

A test sets `script`, which is called with a `Turn` for every `response.create`. A turn has a numbered log, as a real
response has: it is delivered to whoever reads, survives their connections (and the router's own restart), and is
replayed from any number on. Knows no node and no model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from aiohttp import WSMsgType, web

from router.http import pages

Json = dict[str, Any]

ENDS = ("response.completed", "response.incomplete", "response.failed")


class Socket:
    """A client's connection: its frames, and the transport beneath, which can be cut, or go silent without a word."""

    def __init__(self, frames: web.WebSocketResponse, transport: asyncio.Transport) -> None:
        self.frames = frames
        self.transport = transport
        self.is_dead = False

    async def send(self, event: Json) -> None:
        if not self.is_dead and not self.frames.closed:
            await self.frames.send_str(json.dumps(event))


class Refusal(NamedTuple):
    """What a resume is answered instead of events."""

    status: int
    code: str
    message: str
    retry_after_ms: int | None = None


class Turn:
    """One response: its request, its log, its readers, and the means to answer. `stopped` is set by a cancel."""

    def __init__(self, socket: Socket, request: Json, response_id: str) -> None:
        self.request = request
        self.response_id = response_id
        self.stopped = asyncio.Event()
        self.log: list[Json] = []
        self.readers = {socket}
        self.resumed_after: list[int] = []
        self._node: Json | None = None
        self._speaks = asyncio.Lock()

    @property
    def text(self) -> str:
        return "".join(event["delta"] for event in self.log if event["type"] == "response.output_text.delta")

    @property
    def is_over(self) -> bool:
        return bool(self.log) and self.log[-1]["type"] in ENDS

    async def says_event(self, **event: Any) -> None:
        """Give `event` its number and deliver it to all who read."""
        async with self._speaks:
            self.log.append({**event, "sequence_number": len(self.log)})
            await self._tell(self.log[-1])

    async def resumes(self, socket: Socket, starting_after: int) -> None:
        async with self._speaks:
            self.resumed_after.append(starting_after)
            for event in self.log[starting_after + 1 :]:
                await socket.send(event)
            if not self.is_over:
                self.readers.add(socket)
                if self._node is not None:
                    await socket.send(self._node)

    async def created(self, node: str = "edge-1", region: str = "eu") -> None:
        await self.says_event(type="response.created", response={"id": self.response_id})
        await self.moved(node, region)
        await self.says_event(type="response.in_progress", response={"id": self.response_id})
        item = {"id": "msg_1", "type": "message", "role": "assistant", "content": []}
        await self.says_event(type="response.output_item.added", output_index=0, item=item)

    async def moved(self, node: str, region: str) -> None:
        self._node = {"type": "edgechat:node", "response_id": self.response_id, "node": node, "region": region}
        await self._tell(self._node)

    async def reads(self, computed: int, total: int) -> None:
        event = {"type": "edgechat:progress", "response_id": self.response_id, "computed": computed, "total": total}
        await self._tell(event)

    async def says(self, *texts: str) -> None:
        for text in texts:
            await self.says_event(type="response.output_text.delta", item_id="msg_1", output_index=0, delta=text)

    async def ends(self, kind: str = "completed", **fields: Any) -> None:
        await self.says_event(type=f"response.{kind}", response={"id": self.response_id, **fields})
        self.readers.clear()

    async def fails(self, code: str, message: str, *, retryable: bool) -> None:
        error = {
            "code": "server_error",
            "message": f"{code}: {message}",
            "edgechat_code": code,
            "retryable": retryable,
        }
        await self.ends("failed", error=error)

    async def refuses(self, code: str, message: str, param: str | None = None) -> None:
        await self._tell(error_event(400, code, message, param))

    async def breaks_off(self, code: str, message: str) -> None:
        """Stop without an end, as a router does that cannot write its journal: the readers are told, the log is not."""
        await self._tell(error_event(503, code, message, retry_after_ms=10))
        self.readers.clear()

    async def drops(self) -> None:
        """End the readers' connections as a killed router does: without a close frame."""
        for socket in self.readers:
            socket.transport.abort()
        self.readers.clear()

    async def answers(self, *texts: str) -> None:
        await self.created()
        await self.says(*texts)
        await self.ends()

    async def _tell(self, event: Json) -> None:
        for socket in list(self.readers):
            await socket.send(event)


def error_event(
    status: int, code: str, message: str, param: str | None = None, retry_after_ms: int | None = None
) -> Json:
    told = {"code": code, "message": message, "param": param}
    kind = "invalid_request_error" if status < 500 else "server_error"
    event = {"type": "error", "sequence_number": 0, "status": status, "error": {"type": kind, **told}, **told}
    return event if retry_after_ms is None else {**event, "retry_after_ms": retry_after_ms}


Script = Callable[[Turn], Awaitable[None]]


async def echo(turn: Turn) -> None:
    """The script of a test that does not care: repeat the question."""
    said = turn.request["input"]
    await turn.answers("You said: ", said if isinstance(said, str) else said[-1]["content"])


class FakeRouter:
    """Up after `up()`, on the same port every time; `requests` holds what clients sent, oldest first.

    `refusals`: what the next resumes are answered, oldest first. `turns`: every response, by id; it outlives `down()`.
    """

    def __init__(self) -> None:
        self.key = "dev"
        self.models = ["smollm2-135m"]
        self.script: Script = echo
        self.requests: list[Json] = []
        self.refusals: list[Refusal] = []
        self.handshakes = 0
        self.turns: dict[str, Turn] = {}
        self._port = 0
        self._sockets: set[Socket] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    def sent(self, kind: str) -> list[Json]:
        """What clients sent of one type."""
        return [request for request in self.requests if request["type"] == kind]

    async def up(self) -> None:
        app = web.Application()
        app.router.add_get("/", pages.index)
        app.router.add_get("/web/{path}", pages.file)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_get("/v1/responses", self._responses)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def down(self) -> None:
        for task in self._tasks:
            task.cancel()
        for socket in list(self._sockets):
            socket.transport.abort()
        for turn in self.turns.values():
            turn.readers.clear()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def close_all(self, code: int, message: bytes) -> None:
        for socket in list(self._sockets):
            await socket.frames.close(code=code, message=message)

    def forget_the_present_connections(self) -> None:
        """As a NAT that lost its table: they stay open, and nothing is heard on them any more, in either direction."""
        for socket in self._sockets:
            socket.is_dead = True

    async def _list_models(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"code": "invalid_api_key"}}, status=401)
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _responses(self, request: web.Request) -> web.WebSocketResponse:
        offered = request.headers.get("Sec-WebSocket-Protocol", "")
        if f"openai-insecure-api-key.{self.key}" not in [part.strip() for part in offered.split(",")]:
            raise web.HTTPUnauthorized
        frames = web.WebSocketResponse(protocols=["responses.v1.json"])
        await frames.prepare(request)
        assert isinstance(request.transport, asyncio.Transport)
        socket = Socket(frames, request.transport)
        self.handshakes += 1
        self._sockets.add(socket)
        try:
            async for message in frames:
                if message.type is WSMsgType.TEXT and not socket.is_dead:
                    await self._on_event(socket, json.loads(message.data))
        finally:
            self._sockets.discard(socket)
            for turn in self.turns.values():
                turn.readers.discard(socket)
        return frames

    async def _on_event(self, socket: Socket, event: Json) -> None:
        self.requests.append(event)
        match event["type"]:
            case "response.create":
                self._create(socket, event)
            case "response.cancel":
                await self._cancel(socket, event["response_id"])
            case "edgechat:resume":
                await self._resume(socket, event["response_id"], event["starting_after"])
            case kind:
                raise AssertionError(f"the page sent {kind}")

    def _create(self, socket: Socket, event: Json) -> None:
        turn = Turn(socket, event, f"resp_fake_{len(self.turns)}")
        self.turns[turn.response_id] = turn
        task = asyncio.ensure_future(self._run(turn))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel(self, socket: Socket, response_id: str) -> None:
        turn = self.turns.get(response_id)
        if turn is None or turn.is_over:
            await socket.send(error_event(404, "response_not_found", f"No {response_id}.", "response_id"))
        else:
            turn.stopped.set()

    async def _resume(self, socket: Socket, response_id: str, starting_after: int) -> None:
        turn = self.turns.get(response_id)
        if self.refusals:
            refusal = self.refusals.pop(0)
            param = "response_id" if refusal.status == 404 else None
            await socket.send(error_event(refusal.status, refusal.code, refusal.message, param, refusal.retry_after_ms))
        elif turn is None:
            await socket.send(error_event(404, "response_not_found", f"No {response_id}.", "response_id"))
        elif starting_after >= len(turn.log):
            await socket.send(error_event(400, "invalid_request", "Nothing that far was said yet.", "starting_after"))
        else:
            await turn.resumes(socket, starting_after)

    async def _run(self, turn: Turn) -> None:
        await self.script(turn)
