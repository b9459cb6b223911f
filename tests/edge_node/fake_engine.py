"""An engine process made of two queues, a node around it in this process, and a router to speak to it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self, TypeVar

from websockets.asyncio.client import ClientConnection, connect

from core.conversation import Item
from core.frames import (
    MAX_FRAME_BYTES,
    PROTOCOL,
    Generate,
    Hello,
    Rates,
    Row,
    Sampling,
    Text,
    ToNode,
    ToRouter,
    decode_to_router,
    encode,
)
from core.manifest import FORMAT, KvShape, Manifest, Source
from edge_node.config import EdgeSettings, read_settings
from edge_node.node import Node
from edge_node.runtime.pipe import Beat, Load, Loaded, ToChild, ToParent

HOST = "127.0.0.1"
RELEASE = "tiny@0123456789ab"
IDLE = Beat(step=0, age_s=-1.0, predicted_s=0.0, running=0, waiting=0, rates=Rates())

T = TypeVar("T")

MANIFEST = Manifest(
    format=FORMAT,
    graph_abi=1,
    model="tiny",
    release=RELEASE,
    variant="test",
    family="llama",
    exporter_version="0",
    source=Source("tiny", "0" * 64, "llama"),
    context_tokens=256,
    vocab_size=8,
    tokenizer_size=8,
    kv=KvShape(1, 1, 2, "float32"),
    stop_ids=[0],
    bos_id=None,
    batch_invariant=True,
    device="cpu",
    operators=[],
    speech="chat_template",
    graph="model.onnx",
    tokenizer="tokenizer.json",
    chat_template="chat_template.jinja",
    quality=None,
    files=[],
    claims={},
    golden=[],
)


class FakeEngine:
    """Says what the test tells it to say; notes what it was told."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.backed_up = False
        self.killed = False
        self.stuck = False  # in a driver: not even a kill ends it at once
        self.told: asyncio.Queue[ToChild] = asyncio.Queue()
        self._says: asyncio.Queue[ToParent | None] = asyncio.Queue()

    def send(self, message: ToChild) -> None:
        self.told.put_nowait(message)

    async def receive(self) -> ToParent | None:
        return await self._says.get()

    def kill(self) -> None:
        self.killed = True
        if not self.stuck:
            self.die()

    async def end(self) -> str:
        return "signal SIGKILL" if self.killed else "exit code 0"

    # -- for the test ----------------------------------------------------------------------------

    def say(self, *messages: ToParent) -> None:
        for message in messages:
            self._says.put_nowait(message)

    def die(self) -> None:
        self._says.put_nowait(None)

    async def was_told(self, kind: type[T]) -> T:
        """The next message of a kind; what comes before it is passed over."""
        while True:
            message = await self.told.get()
            if isinstance(message, kind):
                return message


class Engines:
    """Starts fake engine processes for a node. Invariant: pids are 1000, 1001, ... in order of start."""

    def __init__(self) -> None:
        self.started: list[FakeEngine] = []
        self._new = asyncio.Condition()

    async def spawn(self) -> FakeEngine:
        async with self._new:
            self.started.append(FakeEngine(1000 + len(self.started)))
            self._new.notify_all()
        return self.started[-1]

    async def nth(self, number: int) -> FakeEngine:
        """The engine of the node's `number`th start, from 1; waits until it has been told to load."""
        async with self._new:
            await self._new.wait_for(lambda: len(self.started) >= number)
        engine = self.started[number - 1]
        await engine.was_told(Load)
        return engine

    async def ready(self, number: int = 1) -> FakeEngine:
        engine = await self.nth(number)
        engine.say(Loaded(0.1), IDLE)
        return engine


class RouterLink:
    """A router's end of a link."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.hello: Hello

    async def send(self, frame: ToNode) -> None:
        await self.connection.send(encode(frame))

    async def receive(self, kind: type[T]) -> T:
        """The next frame of a kind; what comes before it is passed over."""
        while True:
            frame = await self.next()
            if isinstance(frame, kind):
                return frame

    async def next(self) -> ToRouter:
        data = await self.connection.recv()
        assert isinstance(data, bytes)
        return decode_to_router(data)


@contextlib.asynccontextmanager
async def dial(
    port: int, *, secret: str = "", name: str = "r1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[RouterLink]:
    """A link on which both have said Hello."""
    async with open_link(port, secret, tls=tls) as connection:
        link = RouterLink(connection)
        await link.send(Hello(PROTOCOL, "r1", "instance", "eu"))
        link.hello = await link.receive(Hello)
        yield link


def open_link(port: int, secret: str = "", *, tls: ssl.SSLContext | None = None) -> connect:
    """A connection on which nobody has said anything."""
    return connect(
        f"{'wss' if tls else 'ws'}://{HOST}:{port}/link",
        ssl=tls,
        additional_headers={"Authorization": f"Bearer {secret}"} if secret else None,
        compression=None,
        max_size=MAX_FRAME_BYTES,
        proxy=None,
    )


class Served:
    """A node in this process, on a free port, with fake engines. `running` is its `run`."""

    def __init__(self, settings: EdgeSettings, secret: str = "", tls: ssl.SSLContext | None = None) -> None:
        self.engines = Engines()
        self.node = Node(settings, MANIFEST, self.engines.spawn, secret)
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._tls = tls
        self.running: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        self.running = asyncio.create_task(self.node.run(self._listener, self._tls))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.node.stop()
        with contextlib.suppress(Exception):  # a test that expects `run` to fail has looked at it itself
            await self.running
        self._listener.close()


def settings_with(**sections: dict[str, object]) -> EdgeSettings:
    """The least that a node needs, with keys laid over it: settings_with(node={"drain_s": 0})."""
    environ = {
        f"EDGE__{section}__{key}".upper(): str(value)
        for section, keys in sections.items()
        for key, value in keys.items()
    }
    text = '[node]\nname = "eu"\nregion = "europe"\nrelease = "nowhere"\ndrain_s = 0.0\n[engine]\nslots = 4\n'
    return read_settings(text, environ, "edge.toml")


def generate(stream: str, epoch: int = 1, release: str = RELEASE, max_output_tokens: int = 16) -> Generate:
    """A request that says hello."""
    items = [Item("message", "user", "Hello")]
    return Generate(stream, epoch, release, items, [], 7, Sampling(temperature=0.0), [], max_output_tokens)


def row(stream: str, seq: int, text: str = "a", epoch: int = 1) -> Row:
    return Row(stream, epoch, seq, [5], [[Text(text)]])
