"""A router without a network behind it: scripted nodes, a store in memory, a clock that tests move."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from core.conversation import Item
from core.frames import (
    PROTOCOL,
    SPEECH_VERSION,
    Cancel,
    Delta,
    Done,
    Drain,
    Failed,
    Finish,
    Generate,
    Hello,
    ItemEnd,
    ItemStart,
    Progress,
    Rates,
    Row,
    Started,
    Status,
    Text,
    Timings,
    Tokens,
    Usage,
)
from core.stream import Request, RequestRecord
from router.auth import digest
from router.config import Auth, Config, Key, Listen, RouterSection, SessionSection
from router.http.context import Context
from router.journal import Entry, Outcome, StoredResponse
from router.link import LinkDown, LinkEvent, LinkFrame, LinkRtt, LinkUp
from router.registry import LINK_PATH
from router.server import listening, make_context
from router.session import Instant
from tests.fake_store import FakeDatabase, FakeStore

MODEL = "tiny"
BODY = {"model": MODEL, "input": "hi"}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
RELEASE = "tiny@0123456789ab"
Said: TypeAlias = Tokens | Started | Progress | Done | Failed
Script: TypeAlias = Callable[[Generate], list[Said]]


def with_key(name: str) -> dict[str, str]:
    """The header of a client whose key is `name`."""
    return {"Authorization": f"Bearer {name}"}


def record(**changes: object) -> RequestRecord:
    """A record whose request has the given fields."""
    base = {
        "model": MODEL,
        "input": [Item("message", "user", "hi")],
        "temperature": 1.0,
        "top_p": 1.0,
        "max_output_tokens": 64,
    }
    request = Request(**(base | changes))  # type: ignore[arg-type]
    return RequestRecord(id="resp_t_1", tenant="acme", created_at=1000, seed=7, release=RELEASE, request=request)


def words(*texts: str) -> tuple[list[int], list[list[Delta]]]:
    """A message of one id a word, and the id that ends it."""
    ids = list(range(100, 101 + len(texts)))
    deltas: list[list[Delta]] = [[Text(text)] for text in texts]
    deltas[0].insert(0, ItemStart("message", "final_answer"))
    return ids, [*deltas, [ItemEnd()]]


def tokens(stream: str, epoch: int, seq: int, ids: list[int], deltas: list[list[Delta]]) -> Tokens:
    return Tokens([Row(stream, epoch, seq, ids, deltas)])


def done(frame: Generate, output_tokens: int, finish: Finish = "stop") -> Done:
    return Done(frame.stream, frame.epoch, finish, Usage(5, 2, output_tokens), Timings())


def saying(*texts: str, finish: Finish = "stop") -> Script:
    """Say the words, each in a frame of its own, after those the client already has."""

    def script(frame: Generate) -> list[Said]:
        ids, deltas = words(*texts)
        known = len(frame.output_ids)
        rows = [tokens(frame.stream, frame.epoch, seq, [ids[seq]], [deltas[seq]]) for seq in range(known, len(ids))]
        return [Started(frame.stream, frame.epoch, 5, 2), *rows, done(frame, len(ids), finish)]

    return script


def failing(code: str, message: str, *, retryable: bool = False, param: str = "") -> Script:
    return lambda frame: [Failed(frame.stream, frame.epoch, code, retryable, message, 9000, 2048, param)]


class FakeClock:
    def __init__(self) -> None:
        self.mono_s = 100.0

    def __call__(self) -> Instant:
        return Instant(self.mono_s, 1_700_000_000 + int(self.mono_s))


@dataclass
class FakeNode:
    """script: what it says to a Generate; None = the test speaks for it."""

    links: FakeLinks
    hello: Hello
    url: str
    script: Script | None = None
    up: bool = True

    def come_up(self, rtt_s: float = 0.001) -> None:
        self.up = True
        self.links.on_event(LinkUp(self.url, self.hello))
        self.links.on_event(LinkRtt(self.url, rtt_s))
        self.status()

    def go_down(self) -> None:
        self.up = False
        self.links.on_event(LinkDown(self.url, "cut by the test"))

    def status(self, **changes: object) -> None:
        base: dict[str, object] = {
            "load": 0.0,
            "running": 0,
            "waiting": 0,
            "rates": Rates(),
            "chains": [],
            "vouched": True,
            "draining": False,
            "engine_pid": 77,
        }
        self.say(Status(**(base | changes)))  # type: ignore[arg-type]

    def say(self, frame: Said | Status | Drain) -> None:
        self.links.on_event(LinkFrame(self.url, frame))


@dataclass
class FakeLinks:
    """Stands for `LinkPool`; `generates` and `cancels` can be awaited."""

    nodes: dict[str, FakeNode] = field(default_factory=dict)
    generates: asyncio.Queue[tuple[FakeNode, Generate]] = field(default_factory=asyncio.Queue)
    cancels: asyncio.Queue[tuple[FakeNode, Cancel]] = field(default_factory=asyncio.Queue)
    on_event: Callable[[LinkEvent], None] = lambda event: None

    def node(
        self, name: str, script: Script | None = None, *, slots: int = 2, releases: tuple[str, ...] = (RELEASE,)
    ) -> FakeNode:
        """A node that can come up."""
        variants = ["cpu-int8"] * len(releases)
        hello = Hello(
            PROTOCOL, name, "i1", f"region-{name}", list(releases), variants, 2048, slots, SPEECH_VERSION, 4242
        )
        node = FakeNode(self, hello, f"ws://{name}:1{LINK_PATH}", script)
        self.nodes[node.url] = node
        return node

    def send(self, node: str, frame: Generate | Cancel) -> bool:
        target = self.nodes[node]
        if not target.up:
            return False
        match frame:
            case Cancel():
                self.cancels.put_nowait((target, frame))
            case Generate():
                asyncio.get_running_loop().call_soon(self._take, target, frame)
        return True

    def _take(self, node: FakeNode, frame: Generate) -> None:
        """A node without a script accepts the stream, as a real one does at once, and leaves the rest to the test."""
        accepted: list[Said] = [Progress(frame.stream, frame.epoch, 0, 5)]
        for said in node.script(frame) if node.script is not None else accepted:
            node.say(said)
        self.generates.put_nowait((node, frame))


class SlowStore(FakeStore):
    """Waits before every write for `open`, when a test closes it. blocked: set as soon as a write waits."""

    def __init__(self, database: FakeDatabase, name: str = "t", instance: str = "i") -> None:
        super().__init__(database, name, instance)
        self.open = asyncio.Event()
        self.open.set()
        self.blocked = asyncio.Event()

    async def write(self, entries: Sequence[Entry]) -> list[Outcome]:
        if not self.open.is_set():
            self.blocked.set()
            await self.open.wait()
        return await super().write(entries)

    @property
    def kept(self) -> dict[tuple[str, str], StoredResponse]:
        """The finished responses by tenant and id."""
        found = {key: self.get_now(*key) for key in self.database.finished}
        return {key: response for key, response in found.items() if response is not None}


@dataclass
class FakeRouter:
    """A real server on a real port, with fakes behind it."""

    context: Context
    links: FakeLinks
    store: SlowStore
    clock: FakeClock
    port: int

    def wait_s(self, seconds: float) -> None:
        """Let time pass, at the end of which the router looks around."""
        self.clock.mono_s += seconds
        self.context.on_tick()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"


def key(name: str, tenant: str, *roles: str) -> Key:
    return Key(id=name, sha256=digest(name), tenant=tenant, roles=list(roles))  # type: ignore[arg-type]


CONFIG = Config(
    router=RouterSection(name="t"),
    listen=Listen(port=0),
    session=SessionSection(resume_wait_s=0.0),
    auth=Auth(
        dev_key=True, keys=[key("alice", "acme", "chat"), key("bob", "other", "chat"), key("ops", "ops", "admin")]
    ),
)


@asynccontextmanager
async def running_router(config: Config = CONFIG, database: FakeDatabase | None = None) -> AsyncIterator[FakeRouter]:
    """A router that accepts the keys dev, alice (tenant acme), bob (tenant other) and ops (admin only)."""
    links, clock = FakeLinks(), FakeClock()
    store = SlowStore(database or FakeDatabase(clock=lambda: clock().mono_s), config.router.name)
    store.beat_now(clock().mono_s)
    context = make_context(config, "secret", links, store, clock)
    links.on_event = context.sessions.on_link_event
    async with listening(context) as port:
        yield FakeRouter(context, links, store, clock, port)
