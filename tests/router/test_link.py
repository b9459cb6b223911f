"""LinkPool against a scripted node: a real `websockets` server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

import router.link as link_module
from core.conversation import Item
from core.errors import ConfigError
from core.frames import (
    MAX_FRAME_BYTES,
    Cancel,
    Done,
    Failed,
    Frame,
    Generate,
    Hello,
    Ping,
    Rates,
    Row,
    Sampling,
    Status,
    Text,
    Timings,
    Tokens,
    ToNode,
    Usage,
    decode_to_node,
    encode,
)
from router.backoff import Backoff
from router.config import LinkSection
from router.link import LinkDown, LinkEvent, LinkFrame, LinkPool, LinkRtt, LinkTiming, LinkUp
from router.registry import NodeAddress
from router.server import link_tls

TLS = Path(__file__).parent.parent / "edge_node/tls"
CERTIFICATE, PRIVATE_KEY = TLS / "cert.pem", TLS / "key.pem"
SECRET = "the-link-secret-of-this-test"
ROUTER = Hello(protocol=1, name="r1", instance="router-instance", region="eu")
NODE = Hello(1, "n1", "node-instance", "eu", ["m@0123456789ab"], ["cpu-int8"], 2048, 4, 1, 7)
FAST = LinkTiming(connect_s=5.0, beat_s=0.02, silent_beats=10_000, backoff_first_s=0.001, backoff_most_s=0.01)

Script = Callable[[ServerConnection], Awaitable[None]]


def status(echo: int = 0) -> Status:
    return Status(0.0, 0, 0, Rates(), [], True, False, echo=echo)


def generate(stream: str, text: str = "hi") -> Generate:
    return Generate(stream, 1, "m@0123456789ab", [Item("message", "user", text)], [], 1, Sampling(), [], 5)


def done(stream: str) -> Done:
    return Done(stream, 1, "stop", Usage(1, 0, 1), Timings())


async def answering(socket: ServerConnection) -> None:
    """A well-behaved node: Hello, then an echo of each ping, until the router leaves."""
    await socket.send(encode(NODE))
    with contextlib.suppress(ConnectionClosed):
        async for message in socket:
            assert isinstance(message, bytes)
            match decode_to_node(message):
                case Ping(nonce):
                    await socket.send(encode(status(echo=nonce)))
                case _:
                    pass


class ScriptedNode:
    """Listens, checks the secret as a node does, and lets `script` do the talking. `heard`: every frame but pings."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.heard: list[ToNode] = []
        self.sockets: list[ServerConnection] = []
        self.refused = 0
        self.secret = SECRET
        self.tls: ssl.SSLContext | None = None

    async def start(self) -> None:
        self._server = await serve(
            self._handle,
            "127.0.0.1",
            0,
            process_request=self._check,
            compression=None,
            max_size=MAX_FRAME_BYTES,
            ssl=self.tls,
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]
        self.address = NodeAddress(f"{'wss' if self.tls else 'ws'}://127.0.0.1:{self.port}/link", "n1", "eu")
        self.url = self.address.url

    async def stop(self) -> None:
        for socket in self.sockets:
            socket.transport.abort()
        self._server.close()
        await self._server.wait_closed()

    def _check(self, _socket: ServerConnection, request: Request) -> Response | None:
        if request.headers.get("Authorization") == f"Bearer {self.secret}" and request.path == "/link":
            return None
        self.refused += 1
        return _socket.respond(http.HTTPStatus.UNAUTHORIZED, "no\n")

    async def _handle(self, socket: ServerConnection) -> None:
        self.sockets.append(socket)
        receive = socket.recv

        async def recv(decode: bool | None = None) -> bytes:
            message = await receive(decode=False)
            frame = decode_to_node(message)
            if not isinstance(frame, Ping):
                self.heard.append(frame)
            return message

        socket.recv = recv  # type: ignore[method-assign, assignment]
        await self.script(socket)


class Events:
    """What the pool reported, and a way to wait for it."""

    def __init__(self) -> None:
        self.all: list[LinkEvent] = []
        self._changed = asyncio.Event()

    def __call__(self, event: LinkEvent) -> None:
        self.all.append(event)
        self._changed.set()

    async def until(self, enough: Callable[[list[LinkEvent]], bool]) -> None:
        async with asyncio.timeout(30):
            while not enough(self.all):
                self._changed.clear()
                await self._changed.wait()

    def ups(self) -> list[LinkUp]:
        return [event for event in self.all if isinstance(event, LinkUp)]

    def downs(self) -> list[LinkDown]:
        return [event for event in self.all if isinstance(event, LinkDown)]

    def frames(self) -> list[Frame]:
        return [event.frame for event in self.all if isinstance(event, LinkFrame) and type(event.frame) is not Status]

    async def until_up(self, times: int = 1) -> None:
        await self.until(lambda _: len(self.ups()) >= times)

    async def until_down(self, times: int = 1) -> None:
        await self.until(lambda _: len(self.downs()) >= times)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def linked(
    script: Script, timing: LinkTiming = FAST, *, secret: str = SECRET, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[ScriptedNode, LinkPool, Events]]:
    """A scripted node and a pool that was told its address."""
    node, events = ScriptedNode(script), Events()
    if tls is not None:
        node.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=CERTIFICATE)
        node.tls.load_cert_chain(CERTIFICATE, PRIVATE_KEY)
        node.tls.verify_mode = ssl.CERT_REQUIRED
    await node.start()
    pool = LinkPool(ROUTER, secret, events, ssl_context=tls, timing=timing)
    pool.set_addresses([node.address])
    try:
        yield node, pool, events
    finally:
        await pool.close()
        await node.stop()
    assert [type(event) for event in events.all if isinstance(event, LinkUp | LinkDown)] == [
        LinkUp,
        LinkDown,
    ] * len(events.ups()), "LinkUp and LinkDown alternate"


async def test_both_say_hello_and_the_first_round_trip_is_measured_at_once() -> None:
    async with linked(answering) as (node, _, events):
        await events.until(lambda all_: any(isinstance(event, LinkRtt) for event in all_))
        assert events.all[0] == LinkUp(node.url, NODE)
        rtt = next(event for event in events.all if isinstance(event, LinkRtt))
        assert rtt.node == node.url
        assert rtt.rtt_s > 0
        assert node.heard == [ROUTER]


def test_a_round_trip_shorter_than_a_millisecond_is_measured_on_the_routers_own_loop_too() -> None:
    async def measure() -> list[float]:
        async with linked(answering) as (_, _, events):
            await events.until(lambda all_: sum(isinstance(event, LinkRtt) for event in all_) >= 8)
            return [event.rtt_s for event in events.all if isinstance(event, LinkRtt)]

    assert all(rtt_s > 0 and round(rtt_s, 3) != rtt_s for rtt_s in uvloop.run(measure()))


async def test_a_node_behind_tls_is_believed_by_its_certificate_and_shown_ours() -> None:
    files = LinkSection(tls_ca=str(CERTIFICATE), tls_cert=str(CERTIFICATE), tls_key=str(PRIVATE_KEY))
    async with linked(answering, tls=link_tls(files)) as (node, _, events):
        await events.until_up()
        assert node.url.startswith("wss://")


async def test_a_node_whose_certificate_nobody_vouches_for_is_not_sent_the_secret(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with linked(answering, tls=link_tls(LinkSection())) as (node, _, _):
        await until(lambda: "certificate" in caplog.text)
        assert (node.heard, node.refused) == ([], 0)


def test_certificates_of_the_link_that_cannot_be_read_are_named() -> None:
    with pytest.raises(ConfigError, match=r"\[link\] \(/none\.pem\)"):
        link_tls(LinkSection(tls_ca="/none.pem"))


async def test_frames_go_both_ways_in_order() -> None:
    rows = [Tokens([Row("s", 1, seq, [seq], [[Text(str(seq))]])]) for seq in range(2000)]

    async def script(socket: ServerConnection) -> None:
        await socket.send(encode(NODE))
        await socket.recv()
        for expected in range(200):
            while not isinstance(frame := decode_to_node(await socket.recv(decode=False)), Cancel):
                pass
            assert frame == Cancel("s", expected)
        for row in rows:
            await socket.send(encode(row))
        await answering(socket)

    async with linked(script) as (node, pool, events):
        await events.until_up()
        assert all(pool.send(node.url, Cancel("s", epoch)) for epoch in range(200))
        await events.until(lambda _: len(events.frames()) >= len(rows))
        assert events.frames()[: len(rows)] == rows


async def test_a_frame_for_a_node_without_a_link_is_not_taken() -> None:
    async with linked(answering) as (node, pool, events):
        assert not pool.send(node.url, Cancel("s", 1)), "not up yet"
        assert not pool.send("ws://127.0.0.1:1/link", Cancel("s", 1)), "never heard of"
        await events.until_up()
        assert pool.send(node.url, Cancel("s", 1))
        node.sockets[0].transport.abort()
        node.secret = "changed"
        await events.until_down()
        assert not pool.send(node.url, Cancel("s", 2)), "down"


async def test_a_wrong_secret_is_named_once_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    async with linked(answering, secret="not-" + SECRET) as (node, _, events):
        await until(lambda: node.refused >= 5)
        assert events.all == []
        refusals = [record for record in caplog.records if "give both the same link secret" in record.getMessage()]
        assert len([record for record in refusals if record.levelno >= logging.WARNING]) == 1
        assert SECRET not in caplog.text


async def test_a_link_comes_up_when_the_secret_is_mended() -> None:
    node, events = ScriptedNode(answering), Events()
    node.secret = "another"
    await node.start()
    pool = LinkPool(ROUTER, SECRET, events, timing=FAST)
    pool.set_addresses([node.address])
    await until(lambda: node.refused >= 2)
    node.secret = SECRET
    await events.until_up()
    await pool.close()
    await node.stop()


@pytest.mark.parametrize("protocol", [0, 2, 77])
async def test_another_protocol_is_refused_with_both_numbers(protocol: int, caplog: pytest.LogCaptureFixture) -> None:
    async def script(socket: ServerConnection) -> None:
        await socket.send(encode(Hello(protocol, "n1", "i", "eu")))
        await socket.wait_closed()

    async with linked(script) as (node, _, events):
        await until(lambda: len(node.sockets) >= 3)
        assert events.all == []
    assert f"speaks link protocol {protocol}, this router speaks 1" in caplog.text


@pytest.mark.parametrize(
    ("first", "sentence"),
    [
        (encode(status()), "first frame is Status, it must be Hello"),
        (b"\xc1", "cannot read"),
        ("hello", "text message"),
    ],
)
async def test_a_node_that_does_not_begin_with_hello_gets_no_link(
    first: bytes | str, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(socket: ServerConnection) -> None:
        await socket.send(first)
        await socket.wait_closed()

    async with linked(script) as (node, _, events):
        await until(lambda: len(node.sockets) >= 2)
        assert events.all == []
    assert sentence in caplog.text


async def test_a_node_that_never_says_hello_is_left_after_the_connect_timeout(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with linked(lambda socket: socket.wait_closed(), LinkTiming(connect_s=0.05, backoff_first_s=0.001)) as (
        node,
        _,
        events,
    ):
        await until(lambda: len(node.sockets) >= 2)
        assert events.all == []
    assert "did not answer in time" in caplog.text


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [(b"\xc1", "cannot read"), (b"\x92\xa5drain\xa1\xff", "cannot read"), (encode(NODE), "Hello twice"), ("x", "text")],
)
async def test_a_bad_frame_drops_the_link_and_it_is_opened_again(bad: bytes | str, sentence: str) -> None:
    async def script(socket: ServerConnection) -> None:
        await socket.send(encode(NODE))
        if len(node.sockets) == 1:
            await socket.send(bad)
        await answering_after_hello(socket)

    async def answering_after_hello(socket: ServerConnection) -> None:
        await socket.wait_closed()

    async with linked(script) as (node, _, events):
        await events.until_up(2)
        assert sentence in events.downs()[0].reason


async def test_a_node_that_accepts_and_hangs_up_is_tried_ever_more_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    delays_s: list[float] = []

    class Recording(Backoff):
        def next_delay_s(self, lived_s: float = 0.0) -> float:
            delays_s.append(super().next_delay_s(lived_s))
            return delays_s[-1]

    monkeypatch.setattr(link_module, "Backoff", Recording)
    monkeypatch.setattr(random, "random", lambda: 1.0)

    async def script(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send(encode(NODE))
        await socket.close()

    timing = LinkTiming(backoff_first_s=0.001, backoff_most_s=0.016, min_life_s=3600)
    async with linked(script, timing) as (_, _, events):
        await events.until_down(6)
    assert delays_s[:6] == pytest.approx([0.001, 0.002, 0.004, 0.008, 0.016, 0.016])


async def test_a_node_that_falls_silent_is_cut_although_its_socket_stays_open() -> None:
    async def script(socket: ServerConnection) -> None:
        await socket.send(encode(NODE))
        socket.transport.pause_reading()
        await socket.wait_closed()

    timing = LinkTiming(beat_s=0.01, silent_beats=5, backoff_first_s=0.001)
    async with linked(script, timing) as (_, _, events):
        await events.until_down()
        assert "fell silent" in events.downs()[0].reason


async def test_a_node_that_speaks_without_answering_pings_keeps_its_link() -> None:
    async def script(socket: ServerConnection) -> None:
        await socket.send(encode(NODE))
        while True:
            await socket.send(encode(status()))
            await asyncio.sleep(0.005)

    timing = LinkTiming(beat_s=0.05, silent_beats=2, backoff_first_s=0.001)
    async with linked(script, timing) as (_, _, events):
        await events.until(lambda all_: len(all_) > 60)
        assert events.downs() == []
        assert not any(isinstance(event, LinkRtt) for event in events.all)


async def test_a_node_that_reads_nothing_is_cut_when_the_queue_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_QUEUED_BYTES", 4_000_000)

    async def script(socket: ServerConnection) -> None:
        await socket.send(encode(NODE))
        socket.transport.pause_reading()
        await socket.wait_closed()

    async with linked(script) as (node, pool, events):
        await events.until_up()
        sent = 0
        while pool.send(node.url, generate("s", "x" * 1_000_000)):
            sent += 1
            await asyncio.sleep(0)
            assert sent < 100, "the queue has no bound"
        await events.until_down()
        assert "does not take what it is sent" in events.downs()[0].reason


async def test_a_generate_that_no_link_can_carry_is_answered_and_harms_no_other_stream() -> None:
    async with linked(answering) as (node, pool, events):
        await events.until_up()
        assert pool.send(node.url, generate("big", "x" * (MAX_FRAME_BYTES + 1)))
        unsendable = Generate(
            "odd", 1, "m@0", [], [], 1, Sampling(), [], 5, tools=[{"parameters": {"maximum": 10**30}}]
        )
        assert pool.send(node.url, unsendable)
        await events.until(lambda _: len(events.frames()) == 2)
        big, odd = events.frames()
        assert isinstance(big, Failed) and isinstance(odd, Failed)
        assert (big.stream, big.code, big.retryable) == ("big", "invalid_request", False)
        assert str(MAX_FRAME_BYTES) in big.message
        assert "cannot be sent" in odd.message
        assert pool.send(node.url, generate("small"))
        await until(lambda: generate("small") in node.heard)
        assert events.downs() == []


async def test_a_link_that_is_up_outlives_its_address() -> None:
    async with linked(answering) as (node, pool, events):
        await events.until_up()
        pool.set_addresses([])
        assert pool.send(node.url, Cancel("s", 1))
        await until(lambda: Cancel("s", 1) in node.heard)
        node.sockets[0].transport.abort()
        await events.until_down()
        await until(lambda: not pool._links)
        assert len(node.sockets) == 1, "it was not opened again"
        pool.set_addresses([node.address])
        await events.until_up(2)


async def test_a_vanished_address_without_a_link_is_forgotten() -> None:
    async with linked(answering, secret="wrong") as (node, pool, events):
        await until(lambda: node.refused >= 1)
        pool.set_addresses([])
        assert not pool._links
        assert events.all == []


async def test_an_address_that_returns_before_its_link_is_lost_is_kept() -> None:
    async with linked(answering) as (node, pool, events):
        await events.until_up()
        pool.set_addresses([])
        pool.set_addresses([node.address])
        node.sockets[0].transport.abort()
        await events.until_up(2)


async def test_a_node_that_starts_later_or_comes_back_is_linked() -> None:
    node, events = ScriptedNode(answering), Events()
    await node.start()
    address = node.address
    await node.stop()
    pool = LinkPool(ROUTER, SECRET, events, timing=FAST)
    pool.set_addresses([address, NodeAddress("ws://[::bad/link", "x", ""), NodeAddress("ws://" + "a" * 70, "y", "")])
    again = ScriptedNode(answering)
    again._server = await serve(again._handle, "127.0.0.1", node.port)
    await events.until_up()
    await pool.close()
    await again.stop()
    assert events.downs() == [LinkDown(address.url, "closed by this router")]


async def test_a_mistake_in_the_event_handler_costs_one_link_not_the_node(caplog: pytest.LogCaptureFixture) -> None:
    events = Events()

    def handler(event: LinkEvent) -> None:
        events(event)
        if isinstance(event, LinkUp) and len(events.ups()) == 1:
            raise RuntimeError("a bug")

    node = ScriptedNode(answering)
    await node.start()
    pool = LinkPool(ROUTER, SECRET, handler, timing=FAST)
    pool.set_addresses([node.address])
    await events.until_up(2)
    await pool.close()
    await node.stop()
    assert len(events.downs()) == 2
    assert "an error of the router's own" in caplog.text


async def test_events_of_several_nodes_carry_the_node_that_they_are_of() -> None:
    async def script(socket: ServerConnection) -> None:
        await socket.send(encode(NODE))
        await socket.send(encode(done(str(socket.local_address[1]))))
        await socket.wait_closed()

    nodes, events = [ScriptedNode(script) for _ in range(3)], Events()
    for node in nodes:
        await node.start()
    pool = LinkPool(ROUTER, SECRET, events, timing=FAST)
    pool.set_addresses([node.address for node in nodes])
    await events.until(lambda _: len(events.frames()) == 3)
    for node in nodes:
        assert LinkFrame(node.url, done(str(node.port))) in events.all
    await pool.close()
    for node in nodes:
        await node.stop()
    assert len(events.downs()) == 3
