"""A router of the tests' own: serves the page as the real one does and speaks the WebSocket mode by script.

A test sets `script`, which is called with a `Turn` for every `response.create`. Knows no node and no model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from aiohttp import WSMsgType, web

from router.http import pages

Json = dict[str, Any]


class Socket(NamedTuple):
    """A client's connection: its frames, and the transport beneath, which can be cut."""

    frames: web.WebSocketResponse
    transport: asyncio.Transport


class Turn:
    """One `response.create` and the means to answer it. `stopped` is set when the client cancels it."""

    def __init__(self, socket: Socket, request: Json, response_id: str) -> None:
        self.socket = socket
        self.request = request
        self.response_id = response_id
        self.stopped = asyncio.Event()

    async def send(self, **event: Any) -> None:
        await self.socket.frames.send_str(json.dumps(event))

    async def created(self, node: str = "edge-1", region: str = "eu") -> None:
        await self.send(type="response.created", sequence_number=0, response={"id": self.response_id})
        await self.moved(node, region)

    async def moved(self, node: str, region: str) -> None:
        await self.send(type="edgechat:node", response_id=self.response_id, node=node, region=region)

    async def says(self, *texts: str) -> None:
        for text in texts:
            await self.send(type="response.output_text.delta", item_id="msg_1", output_index=0, delta=text)

    async def ends(self, kind: str = "completed", **fields: Any) -> None:
        await self.send(type=f"response.{kind}", response={"id": self.response_id, **fields})

    async def fails(self, code: str, message: str, *, retryable: bool) -> None:
        error = {
            "code": "server_error",
            "message": f"{code}: {message}",
            "edgechat_code": code,
            "retryable": retryable,
        }
        await self.ends("failed", error=error)

    async def refuses(self, code: str, message: str, param: str | None = None) -> None:
        told = {"code": code, "message": message, "param": param}
        error = {"type": "invalid_request_error", **told}
        await self.send(type="error", sequence_number=0, status=400, error=error, **told)

    async def drops(self) -> None:
        """End the connection as a killed router does: without a close frame."""
        self.socket.transport.abort()

    async def answers(self, *texts: str) -> None:
        await self.created()
        await self.says(*texts)
        await self.ends()


Script = Callable[[Turn], Awaitable[None]]


async def echo(turn: Turn) -> None:
    """The script of a test that does not care: repeat the question."""
    said = turn.request["input"]
    await turn.answers("You said: ", said if isinstance(said, str) else said[-1]["content"])


class FakeRouter:
    """Up after `up()`, on the same port every time; `requests` holds what clients sent, oldest first."""

    def __init__(self) -> None:
        self.key = "dev"
        self.models = ["smollm2-135m"]
        self.script: Script = echo
        self.requests: list[Json] = []
        self.handshakes = 0
        self._port = 0
        self._turns: dict[str, Turn] = {}
        self._sockets: set[Socket] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

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
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def close_all(self, code: int, message: bytes) -> None:
        for socket in list(self._sockets):
            await socket.frames.close(code=code, message=message)

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
                if message.type is WSMsgType.TEXT:
                    self._on_event(socket, json.loads(message.data))
        finally:
            self._sockets.discard(socket)
        return frames

    def _on_event(self, socket: Socket, event: Json) -> None:
        self.requests.append(event)
        if event["type"] == "response.cancel":
            self._turns[event["response_id"]].stopped.set()
            return
        turn = Turn(socket, event, f"resp_fake_{len(self._turns)}")
        self._turns[turn.response_id] = turn
        task = asyncio.ensure_future(self._run(turn))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, turn: Turn) -> None:
        await self.script(turn)
