"""The router's links: one WebSocket to each node, opened and re-opened from here.

    addresses (discovery) -> LinkPool -> LinkUp, LinkFrame, LinkRtt, LinkDown -> the router's one event handler
                             LinkPool <- Generate, Cancel

Knows how a link is opened, kept alive and given up. Does not know what a stream is, nor which node
to choose. docs/PROTOCOL.md describes the frames; docs/decisions/050-links.md says why it is built like this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from core.errors import FrameError
from core.frames import (
    MAX_FRAME_BYTES,
    PROTOCOL,
    Cancel,
    Done,
    Drain,
    Failed,
    Generate,
    Hello,
    Ping,
    Progress,
    Started,
    Status,
    Tokens,
    ToRouter,
    decode_to_router,
    encode,
)
from router.backoff import Backoff
from router.registry import NodeAddress

log = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 4 * MAX_FRAME_BYTES
RTT_SAMPLES = 8

NodeFrame: TypeAlias = Tokens | Started | Progress | Done | Failed | Status | Drain


class LinkUp(msgspec.Struct, frozen=True):
    """Both sides have said Hello. node: the link's URL, its key everywhere in the router."""

    node: str
    hello: Hello


class LinkDown(msgspec.Struct, frozen=True):
    """The link is gone; comes exactly once for each LinkUp. reason: a phrase for the log."""

    node: str
    reason: str


class LinkRtt(msgspec.Struct, frozen=True):
    """The smoothed round trip; the first follows LinkUp at once, then one a second."""

    node: str
    rtt_s: float


class LinkFrame(msgspec.Struct, frozen=True):
    """A frame of the node, in the order sent."""

    node: str
    frame: NodeFrame


LinkEvent: TypeAlias = LinkUp | LinkDown | LinkRtt | LinkFrame


class LinkTiming(msgspec.Struct, frozen=True):
    """connect_s: for TCP, TLS, handshake and Hello together. beat_s: between pings. silent_beats: beats in
    a row without one byte of the node after which the link is given up; a node speaks four times a second.
    The rest: `router.backoff`.
    """

    connect_s: float = 5.0
    beat_s: float = 1.0
    silent_beats: int = 5
    backoff_first_s: float = 0.1
    backoff_most_s: float = 5.0
    min_life_s: float = 5.0


class _Refused(Exception):
    """The node answered, but with something that makes a link impossible."""


class LinkPool:
    """A link for every address of discovery; all methods are called on the event loop.

    Invariant: events of one node come in order, LinkUp and LinkDown alternate. A link that is up outlives
    its address: discovery says where nodes are, the link says whether they live.

    secret: the bearer secret that nodes expect. on_event: is called synchronously and must not block.
    ssl_context: for wss addresses, None = the system's trust store.
    """

    def __init__(
        self,
        hello: Hello,
        secret: str,
        on_event: Callable[[LinkEvent], None],
        *,
        ssl_context: ssl.SSLContext | None = None,
        timing: LinkTiming | None = None,
    ) -> None:
        self._hello = hello
        self._secret = secret
        self._on_event = on_event
        self._ssl_context = ssl_context
        self._timing = timing or LinkTiming()
        self._links: dict[str, _Link] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def set_addresses(self, addresses: list[NodeAddress]) -> None:
        """Open links to new addresses; forget vanished ones, at once if down, else when they go down."""
        urls = {address.url for address in addresses}
        for url in urls - self._links.keys():
            self._open(url)
        for url, link in list(self._links.items()):
            link.wanted = url in urls
            if not link.wanted and not link.up:
                self._tasks[url].cancel()
                self._forget(url)

    def send(self, node: str, frame: Generate | Cancel) -> bool:
        """Queue a frame; False when the node's link is not up. Never blocks.

        A Generate that no link can carry is answered with `Failed`, as if the node had refused it.
        """
        link = self._links.get(node)
        return link is not None and link.send(frame)

    async def close(self) -> None:
        """Give up every link; those that were up report LinkDown."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._links.clear()
        self._tasks.clear()

    def _open(self, url: str) -> None:
        link = _Link(url, self._hello, self._secret, self._on_event, self._ssl_context, self._timing)
        self._links[url] = link
        task = asyncio.create_task(link.run(), name=f"link {url}")
        self._tasks[url] = task
        task.add_done_callback(lambda done: self._forget(url) if self._tasks.get(url) is done else None)

    def _forget(self, url: str) -> None:
        del self._links[url], self._tasks[url]


class _Link:
    """One address: connect, exchange Hello, pump frames, and again, as long as it is `wanted`."""

    def __init__(
        self,
        url: str,
        hello: Hello,
        secret: str,
        on_event: Callable[[LinkEvent], None],
        ssl_context: ssl.SSLContext | None,
        timing: LinkTiming,
    ) -> None:
        self.wanted = True
        self._url = url
        self._hello = hello
        self._secret = secret
        self._on_event = on_event
        self._ssl_context = ssl_context
        self._timing = timing
        self._connection: _Connection | None = None
        self._said = ""

    @property
    def up(self) -> bool:
        return self._connection is not None

    def send(self, frame: Generate | Cancel) -> bool:
        if self._connection is None:
            return False
        try:
            data = encode(frame)
            if len(data) > MAX_FRAME_BYTES:
                raise FrameError(
                    f"The conversation takes {len(data)} bytes, a link carries {MAX_FRAME_BYTES}; shorten it."
                )
        except FrameError as error:
            failed = Failed(frame.stream, frame.epoch, "invalid_request", False, error.message)
            # Later, like any answer: the caller is in the middle of sending.
            asyncio.get_running_loop().call_soon(self._on_event, LinkFrame(self._url, failed))
            return True
        return self._connection.send(data)

    async def run(self) -> None:
        """Ends when the address is no longer wanted and the link is down."""
        timing, loop = self._timing, asyncio.get_running_loop()
        backoff = Backoff(
            random.random,
            first_s=timing.backoff_first_s,
            most_s=timing.backoff_most_s,
            min_life_s=timing.min_life_s,
        )
        while self.wanted:
            up_at_s: float | None = None
            try:
                async with self._connected() as (socket, hello):
                    up_at_s = loop.time()
                    await self._serve(socket, hello)
            except (OSError, ValueError, WebSocketException, FrameError, _Refused) as error:
                self._say(logging.WARNING, _explain(self._url, error))
            except Exception:
                # A mistake of ours, in the event handler say, must not cost the node for good.
                log.exception("The link to %s broke on an error of the router's own; opening it again.", self._url)
            lived_s = 0.0 if up_at_s is None else loop.time() - up_at_s
            if self.wanted:
                await asyncio.sleep(backoff.next_delay_s(lived_s))

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[ClientConnection, Hello]]:
        """A connection on which both have said Hello; aborted on the way out, whatever happened."""
        give_up_at_s = asyncio.get_running_loop().time() + self._timing.connect_s
        async with asyncio.timeout_at(give_up_at_s):
            socket = await connect(
                self._url,
                additional_headers={"Authorization": f"Bearer {self._secret}"},
                compression=None,  # token frames are tiny, and both ends are ours
                max_size=MAX_FRAME_BYTES,
                open_timeout=None,  # the enclosing timeout counts
                ping_interval=None,  # our own beat measures what the router needs to know
                proxy=None,
                ssl=(self._ssl_context or True) if self._url.startswith("wss:") else None,
            )
        try:
            async with asyncio.timeout_at(give_up_at_s):
                await socket.send(encode(self._hello))
                first = _decode(await socket.recv())
            if not isinstance(first, Hello):
                raise FrameError(f"The node's first frame is {type(first).__name__}, it must be Hello.")
            if (why := refusal(first)) is not None:
                raise _Refused(why)
            yield socket, first
        finally:
            # Never a closing handshake: a peer that no longer reads would hold us up.
            socket.transport.abort()

    async def _serve(self, socket: ClientConnection, hello: Hello) -> None:
        """Pump events until the connection ends; raises what ended it."""
        connection = _Connection(self._url, socket, self._timing)
        self._connection = connection
        self._say(logging.INFO, f"The link to {hello.name} ({self._url}) is up.")
        reason = "closed by this router"
        try:
            self._on_event(LinkUp(self._url, hello))
            await connection.pump(self._on_event)
        except (WebSocketException, FrameError, _Refused) as error:
            reason = connection.given_up or _explain(self._url, error)
            raise _Refused(reason) from error
        except Exception:
            reason = "an error in this router"
            raise
        finally:
            self._connection = None
            self._on_event(LinkDown(self._url, reason))

    def _say(self, level: int, sentence: str) -> None:
        """Log a change of state once, not at every attempt."""
        log.log(level if sentence != self._said else logging.DEBUG, "%s", sentence)
        self._said = sentence


class _Connection:
    """One open WebSocket after Hello: a bounded queue out, a beat that pings and listens for silence, frames in.

    given_up: why this side aborted it, or "".
    """

    def __init__(self, url: str, socket: ClientConnection, timing: LinkTiming) -> None:
        self.given_up = ""
        self._url = url
        self._socket = socket
        self._timing = timing
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()  # bounded in bytes, by `send`
        self._queued_bytes = 0
        self._heard = True
        self._nonce = 0
        self._pinged_at_s: float | None = None
        self._rtts_s: deque[float] = deque(maxlen=RTT_SAMPLES)

    def send(self, data: bytes) -> bool:
        if self.given_up:
            return False
        if self._queued_bytes + len(data) > MAX_QUEUED_BYTES:
            self._give_up(f"The node at {self._url} does not take what it is sent; the link was cut.")
            return False
        self._queued_bytes += len(data)
        self._outgoing.put_nowait(data)
        return True

    async def pump(self, on_event: Callable[[LinkEvent], None]) -> None:
        """Report what the node sends until the connection ends; raises ConnectionClosed or FrameError."""
        helpers = [asyncio.create_task(self._write()), asyncio.create_task(self._beat())]
        try:
            while True:
                frame = _decode(await self._socket.recv())
                self._heard = True
                if isinstance(frame, Hello):
                    raise FrameError("The node said Hello twice.")
                on_event(LinkFrame(self._url, frame))
                if isinstance(frame, Status) and frame.echo == self._nonce and self._pinged_at_s is not None:
                    on_event(self._rtt(self._pinged_at_s))
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    def _rtt(self, pinged_at_s: float) -> LinkRtt:
        """The least of the last few: what the way costs, without the moments when an end was busy."""
        self._rtts_s.append(time.perf_counter() - pinged_at_s)
        self._pinged_at_s = None
        return LinkRtt(self._url, min(self._rtts_s))

    async def _write(self) -> None:
        with contextlib.suppress(ConnectionClosed):  # the reader sees it too, and reports it
            while True:
                data = await self._outgoing.get()
                await self._socket.send(data)
                self._queued_bytes -= len(data)

    async def _beat(self) -> None:
        """Counts beats, not seconds: a pause of this whole process is no silence of the node."""
        silent = 0
        while silent < self._timing.silent_beats:
            self._ping()
            await asyncio.sleep(self._timing.beat_s)
            silent = 0 if self._heard else silent + 1
            self._heard = False
        self._give_up(f"The node at {self._url} fell silent; the link was cut.")

    def _ping(self) -> None:
        """One ping at a time: an answer that is still due keeps its clock, so a slow node looks slow."""
        if self._pinged_at_s is None:
            self._nonce += 1
            # Not the loop's clock: uvloop's has whole milliseconds and stands still within a turn of the loop.
            self._pinged_at_s = time.perf_counter()
            self.send(encode(Ping(self._nonce)))

    def _give_up(self, reason: str) -> None:
        self.given_up = reason
        self._socket.transport.abort()


def refusal(hello: Hello) -> str | None:
    """Why a node cannot be linked to, or None: a router speaks its own protocol and the one before."""
    if PROTOCOL - 1 <= hello.protocol <= PROTOCOL and hello.protocol > 0:
        return None
    return (
        f"The node {hello.name!r} speaks link protocol {hello.protocol}, this router speaks {PROTOCOL} and the one "
        f"before; upgrade the older of the two."
    )


def _decode(message: str | bytes) -> ToRouter:
    if isinstance(message, str):
        raise FrameError("The node sent a text message; the link carries binary frames only.")
    return decode_to_router(message)


def _explain(url: str, error: Exception) -> str:
    """One sentence for the log and for LinkDown."""
    match error:
        case InvalidStatus() if error.response.status_code in {401, 403}:
            return f"The node at {url} refused the link; give both the same link secret."
        case InvalidStatus():
            return f"The node at {url} refused the link with HTTP status {error.response.status_code}."
        case TimeoutError():
            return f"The node at {url} did not answer in time."
        case ConnectionClosed():
            return f"The node at {url} ended the link ({error})."
        case FrameError() | _Refused():
            return f"{url}: {error}" if url not in str(error) else str(error)
        case _:
            return f"The node at {url} cannot be reached ({str(error) or type(error).__name__})."
