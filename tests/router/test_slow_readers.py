"""Clients that read too slowly, over real sockets; nobody else is closed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import psutil
import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType
from websockets.asyncio.client import connect

from core.frames import Delta, Text
from router.http import kernel
from router.http.outbox import Outbox
from router.http.websocket import SLOW_CODE, Peer
from router.reading_pace import PING_EVERY_BYTES
from tests.router.fakes import CONFIG, MODEL, FakeNode, FakeRouter, done, running_router, tokens, with_key, words
from tests.router.raw_client import CLOSE, PING, PONG, TEXT, RawClient, raw_client

LIMITS = CONFIG.limits
KEY = with_key("alice")
TLS = Path(__file__).parent.parent / "edge_node/tls"
KIB = 1024
STALLED = 200
READERS = 8


async def until(condition: Callable[[], object]) -> None:
    """Let everybody run until `condition` holds; the test's own time limit ends it."""
    while not condition():
        await asyncio.sleep(0)


def counted(router: FakeRouter, name: str) -> float:
    value = router.context.metrics.registry.get_sample_value(f"edgechat_router_{name}_total")
    assert value is not None
    return value


def pass_time(router: FakeRouter, seconds: float) -> None:
    """Tick as often as the router does, which is several times between a ping and the end of patience."""
    for _ in range(int(seconds * 4)):
        router.clock.mono_s += 0.25
        router.context.on_tick()


def only_peer(router: FakeRouter) -> Peer:
    (peer,) = router.context.peers
    return cast(Peer, peer)


def only_outbox(router: FakeRouter) -> Outbox:
    (outbox,) = router.context.outboxes
    return outbox


def message(size_bytes: int) -> dict[str, str]:
    """One that is so long as JSON."""
    return {"type": "filler", "text": "x" * (size_bytes - len(b'{"type":"filler","text":""}'))}


@pytest.fixture
async def raw(router: FakeRouter) -> AsyncIterator[RawClient]:
    """An upgraded client that reads nothing by itself."""
    async with raw_client(router.port) as client:
        await client.upgrade()
        await until(lambda: router.context.peers)
        yield client


@pytest.fixture
def server_tls() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(TLS / "cert.pem"))


@pytest.fixture
async def tls_router() -> AsyncIterator[FakeRouter]:
    listen = msgspec.structs.replace(CONFIG.listen, tls_cert=str(TLS / "cert.pem"), tls_key=str(TLS / "key.pem"))
    async with running_router(msgspec.structs.replace(CONFIG, listen=listen)) as router:
        yield router


async def say_until_cut(router: FakeRouter) -> int:
    """Say 4 KiB after another and return how many bytes it took to be rid of the client."""
    peer, said_bytes = only_peer(router), 0
    while router.context.peers:
        peer.send(message(4 * KIB))
        said_bytes += 4 * KIB
        await asyncio.sleep(0)
    return said_bytes


async def test_a_client_that_stops_reading_is_cut_off_when_it_is_too_many_bytes_behind(
    router: FakeRouter, raw: RawClient
) -> None:
    said_bytes = await say_until_cut(router)
    assert LIMITS.slow_reader_bytes < said_bytes < LIMITS.slow_reader_bytes + 64 * KIB
    assert counted(router, "slow_readers") == 1
    assert counted(router, "stalled_connections") == 0
    assert router.context.outboxes == set()
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        while True:
            await raw.frame()


async def test_a_client_that_stops_after_little_is_cut_off_by_time_and_can_read_why(
    router: FakeRouter, raw: RawClient
) -> None:
    only_peer(router).send(message(5 * KIB))
    await until(lambda: only_outbox(router).unread_bytes)
    await asyncio.sleep(0)
    pass_time(router, LIMITS.slow_reader_s)
    assert counted(router, "slow_readers") == 0
    pass_time(router, 0.25)
    assert counted(router, "slow_readers") == 1
    only = [await raw.frame() for _ in range(3)]
    assert [kind for kind, _ in only] == [TEXT, PING, CLOSE]
    assert int.from_bytes(only[2][1][:2], "big") == SLOW_CODE
    assert await raw.some(1) == b""
    await until(lambda: not router.context.peers)


async def test_a_slow_client_that_gets_further_is_kept_to_the_end(router: FakeRouter, raw: RawClient) -> None:
    peer, outbox, seen_bytes = only_peer(router), only_outbox(router), 0
    for _ in range(100):
        peer.send(message(8 * KIB))
    while seen_bytes < 100 * 8 * KIB:
        kind, payload = await raw.frame()
        if kind == PING:
            unread_bytes = outbox.unread_bytes
            raw.send(PONG, payload)
            await until(lambda before=unread_bytes: outbox.unread_bytes < before)  # type: ignore[misc]
            pass_time(router, LIMITS.slow_reader_s - 1)
        else:
            seen_bytes += len(payload)
    assert counted(router, "slow_readers") == 0
    assert router.context.peers == {peer}


@pytest.mark.parametrize("guess", ["offset", "replay"])
async def test_pongs_that_answer_no_ping_do_not_help_a_client(router: FakeRouter, raw: RawClient, guess: str) -> None:
    for _ in range(4):
        only_peer(router).send(message(32 * KIB))
    answered = b""
    while not answered:
        kind, payload = await raw.frame()
        answered = payload if kind == PING else b""
    outbox, before = only_outbox(router), only_outbox(router).unread_bytes
    raw.send(PONG, answered)
    await until(lambda: outbox.unread_bytes < before)
    unread_bytes = outbox.unread_bytes
    payloads = {
        "offset": [offset.to_bytes(8, "big") + answered[8:] for offset in (2 * PING_EVERY_BYTES, 2**63)],
        "replay": [answered, b"", b"x" * 125],
    }[guess]
    for payload in payloads:
        raw.send(PONG, payload)
    # What comes after them is answered, so they were seen.
    raw.send(TEXT, b"nonsense")
    await until(lambda: outbox.unread_bytes > unread_bytes)
    assert outbox.unread_bytes - unread_bytes < KIB
    pass_time(router, LIMITS.slow_reader_s + 1)
    assert counted(router, "slow_readers") == 1
    await until(lambda: not router.context.peers)


async def test_a_client_that_reads_and_answers_no_ping_is_given_up(router: FakeRouter, anyone: ClientSession) -> None:
    async with anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=KEY, autoping=False) as deaf:
        only_peer(router).send(message(KIB))
        assert (await deaf.receive(timeout=10)).type is WSMsgType.TEXT
        pass_time(router, LIMITS.slow_reader_s + 1)
        assert (await deaf.receive(timeout=10)).type is WSMsgType.PING
        assert (await deaf.receive(timeout=10)).type is WSMsgType.CLOSE
        assert deaf.close_code == SLOW_CODE


async def test_a_client_that_has_read_all_is_left_alone(router: FakeRouter, socket: ClientWebSocketResponse) -> None:
    outbox, peer = only_outbox(router), only_peer(router)
    for _ in range(3):
        peer.send(message(KIB))
        assert (await socket.receive(timeout=10)).type is WSMsgType.TEXT
        waiting = asyncio.create_task(socket.receive())
        while outbox.unread_bytes:
            router.clock.mono_s += 0.01
            router.context.on_tick()
            await asyncio.sleep(0)
        pass_time(router, 3 * LIMITS.slow_reader_s)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
    assert router.context.peers == {peer}


async def test_a_client_that_pings_is_answered(router: FakeRouter, raw: RawClient) -> None:
    raw.send(PING, b"are you there?")
    assert await raw.frame() == (PONG, b"are you there?")


async def test_a_client_heard_out_for_sending_too_much_gets_neither_ping_nor_a_second_farewell(
    router: FakeRouter, raw: RawClient
) -> None:
    peer = only_peer(router)
    peer.send(message(KIB))
    assert (await raw.frame())[0] == TEXT
    raw._writer.write(b"\x81\xff" + (64 * KIB * KIB).to_bytes(8, "big") + bytes(4))
    assert await raw.frame() == (CLOSE, (1009).to_bytes(2, "big"))
    pass_time(router, LIMITS.slow_reader_s + 1)
    assert await raw.some(1) == b""


async def test_a_library_that_reads_20_mb_as_fast_as_it_can_is_never_cut_off(router: FakeRouter) -> None:
    most_unread_bytes, text = 0, "x" * (16 * KIB)
    async with connect(f"{router.ws_url}/v1/responses", additional_headers=KEY) as client:
        await until(lambda: router.context.peers)
        peer, outbox = only_peer(router), only_outbox(router)

        async def read() -> int:
            seen = 0
            while seen < 20 * KIB * KIB:
                seen += len(json.loads(await client.recv())["text"])
            return seen

        reading = asyncio.create_task(read())
        for _ in range(20 * KIB // 16):
            peer.send({"type": "filler", "text": text})
            most_unread_bytes = max(most_unread_bytes, outbox.unread_bytes)
            # A node says what it says: a good deal faster than any, and no faster than a client can be.
            await until(lambda: outbox.unread_bytes < LIMITS.slow_reader_bytes // 2)
            router.context.on_tick()
        assert await reading == 20 * KIB * KIB
    assert most_unread_bytes >= PING_EVERY_BYTES
    assert counted(router, "slow_readers") == 0


async def test_what_is_replayed_in_one_go_is_read_whole_however_long_it_is(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    only_peer(router).send(*[message(KIB)] * (5 * KIB))
    router.context.on_tick()
    for _ in range(5 * KIB):
        assert (await socket.receive(timeout=10)).type is WSMsgType.TEXT
    assert counted(router, "slow_readers") == 0


async def test_over_tls_a_stalled_client_is_cut_off_by_bytes(
    tls_router: FakeRouter, server_tls: ssl.SSLContext
) -> None:
    async with raw_client(tls_router.port, server_tls) as client:
        await client.upgrade()
        await until(lambda: tls_router.context.peers)
        said_bytes = await say_until_cut(tls_router)
    assert LIMITS.slow_reader_bytes < said_bytes < LIMITS.slow_reader_bytes + 64 * KIB
    assert counted(tls_router, "slow_readers") == 1


async def test_over_tls_a_client_that_paused_can_read_why_it_was_cut_off(
    tls_router: FakeRouter, server_tls: ssl.SSLContext
) -> None:
    async with raw_client(tls_router.port, server_tls) as client:
        await client.upgrade()
        await until(lambda: tls_router.context.peers)
        only_peer(tls_router).send(message(3 * KIB))
        await asyncio.sleep(0)
        pass_time(tls_router, LIMITS.slow_reader_s + 1)
        only = [await client.frame() for _ in range(3)]
    assert [kind for kind, _ in only] == [TEXT, PING, CLOSE]


class Saying:
    """One answer of a node that the test speaks for, a piece at a time."""

    def __init__(self, node: FakeNode, frame: Any) -> None:
        self._node, self._frame, self._seq = node, frame, 0
        ids, self._first = words("")
        self._id = ids[0]

    def say(self, text: str) -> None:
        start: list[Delta] = self._first[0][:1] if self._seq == 0 else []
        self._node.say(tokens(self._frame.stream, self._frame.epoch, self._seq, [self._id], [[*start, Text(text)]]))
        self._seq += 1

    def end(self) -> None:
        self._node.say(tokens(self._frame.stream, self._frame.epoch, self._seq, [self._id], [self._first[1]]))
        self._node.say(done(self._frame, self._seq + 1))


async def asked(router: FakeRouter) -> Saying:
    node, frame = await router.links.generates.get()
    return Saying(node, frame)


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_client_of_server_sent_events_that_stops_reading_is_cut_off_by_bytes(
    router: FakeRouter, tls_router: FakeRouter, server_tls: ssl.SSLContext, encrypted: bool
) -> None:
    router = tls_router if encrypted else router
    router.links.node("eu").come_up()
    async with raw_client(router.port, server_tls if encrypted else None) as client:
        client.post(store=False)
        answer = await asked(router)
        said_bytes = 0
        while not counted(router, "slow_readers"):
            answer.say("x" * 4 * KIB)
            said_bytes += 4 * KIB
            await asyncio.sleep(0)
            router.context.on_tick()
        # What the client's own system took counts as read: here at most what it and TLS have in hand.
        assert LIMITS.slow_reader_bytes * 0.9 < said_bytes < LIMITS.slow_reader_bytes + 512 * KIB
        await router.links.cancels.get()
        await until(lambda: not router.context.outboxes)


async def test_a_client_of_server_sent_events_that_takes_nothing_is_cut_off_by_time_and_one_that_does_is_not(
    router: FakeRouter,
) -> None:
    router.links.node("eu").come_up()
    async with raw_client(router.port) as client:
        client.post(store=False)
        answer = await asked(router)
        answer.say("x" * 512 * KIB)
        await client.head()
        (outbox,) = router.context.outboxes
        for _ in range(10):
            before = outbox.unread_bytes
            while outbox.unread_bytes == before:
                assert await client.some(KIB)
                outbox.look(router.clock.mono_s)
            pass_time(router, LIMITS.slow_reader_s - 1)
        assert counted(router, "slow_readers") == 0
        await settled(router, outbox)
        pass_time(router, LIMITS.slow_reader_s + 1)
        assert counted(router, "slow_readers") == 1
        await until(lambda: not router.context.outboxes)


async def settled(router: FakeRouter, outbox: Outbox) -> None:
    """Wait until the client's system takes no more by itself."""
    before = -1
    while before != outbox.unread_bytes:
        before = outbox.unread_bytes
        for _ in range(100):
            await asyncio.sleep(0)
        outbox.look(router.clock.mono_s)


async def test_what_the_system_holds_for_a_stalled_client_is_bounded(router: FakeRouter, raw: RawClient) -> None:
    transport = next(iter(router.context.clients())).transport
    assert transport is not None
    while transport.get_write_buffer_size() == 0:
        transport.write(bytes(KIB))
        await asyncio.sleep(0)
    held_bytes = kernel.unacknowledged_bytes(transport)
    assert 0 < held_bytes < 4 * kernel.SEND_BUFFER_BYTES
    transport.abort()
    await until(lambda: not router.context.peers)
    assert kernel.unacknowledged_bytes(transport) == 0


async def test_200_clients_that_never_read_are_cut_off_and_8_readers_get_their_whole_answers() -> None:
    """Each answer is 2 MiB, told 32 KiB at a time to all of them in turn."""
    text, pieces = "x" * 32 * KIB, 64
    process = psutil.Process()
    async with running_router() as router, contextlib.AsyncExitStack() as clients:
        router.links.node("eu", slots=STALLED + READERS).come_up()
        stalled = [await clients.enter_async_context(raw_client(router.port)) for _ in range(STALLED)]
        for client in stalled[::2]:
            await client.upgrade()
            client.ask(store=False)
        for client in stalled[1::2]:
            client.post(store=False)
        http = await clients.enter_async_context(ClientSession())
        url = f"{router.ws_url}/v1/responses"
        readers = [await http.ws_connect(url, headers=KEY) for _ in range(READERS)]
        for reader in readers:
            await reader.send_json({"type": "response.create", "model": MODEL, "input": "hi", "store": False})
        reading = [asyncio.create_task(whole(reader)) for reader in readers]
        answers = [await asked(router) for _ in range(STALLED + READERS)]
        gc.collect()
        before_bytes = most_bytes = process.memory_info().rss
        for number in range(pieces):
            for answer in answers:
                answer.say(text)
            for _ in range(20):
                await asyncio.sleep(0)
            router.context.on_tick()
            if number % 8 == 0:
                most_bytes = max(most_bytes, process.memory_info().rss)
        for answer in answers:
            answer.end()
        assert [len(said) for said in await asyncio.gather(*reading)] == [pieces * len(text)] * READERS
        assert counted(router, "slow_readers") == STALLED
        for reader in readers:
            await reader.close()
        await until(lambda: not router.context.outboxes and not router.context.peers)
        assert len(router.context.sessions) == 0
    # What is allowed unread, its parts in the making, and as much again for how memory is handed out.
    assert most_bytes - before_bytes < 2 * STALLED * (LIMITS.slow_reader_bytes + 512 * KIB)


async def whole(socket: ClientWebSocketResponse) -> str:
    """The text of one answer, put together from what came."""
    said: list[str] = []
    while (event := await socket.receive_json(timeout=60))["type"] != "response.completed":
        said += [event["delta"]] if event["type"] == "response.output_text.delta" else []
    return "".join(said)
