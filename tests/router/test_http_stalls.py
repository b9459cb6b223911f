"""Clients that keep us waiting."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientSession

from router.http.stalls import HEAD_S
from tests.router.fakes import CONFIG, FakeRouter


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
async def test_who_connects_and_asks_nothing_is_cut_off(router: FakeRouter, begun: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    writer.write(begun)
    while not router.context.clients():
        await asyncio.sleep(0)
    router.context.on_tick()
    router.clock.mono_s += HEAD_S + 1
    router.context.on_tick()
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()


async def test_who_asks_and_takes_no_answer_is_cut_off_and_others_are_not(
    router: FakeRouter, http: ClientSession
) -> None:
    stalled = socket.socket()
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stalled.connect(("127.0.0.1", router.port))
    stalled.setblocking(False)
    # Together more than what the system buffers.
    request = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer ops\r\n\r\n"
    await asyncio.get_running_loop().sock_sendall(stalled, request * 2000)
    while not any(client.transport and client.transport.get_write_buffer_size() for client in router.context.clients()):
        await asyncio.sleep(0)
    async with http.get("/livez") as answer:
        assert answer.status == 200
    router.context.on_tick()
    router.clock.mono_s += CONFIG.limits.slow_reader_s + 1
    router.context.on_tick()
    while len(list(router.context.clients())) > 1:
        await asyncio.sleep(0)
    async with http.get("/livez") as answer:
        assert answer.status == 200
    stalled.close()


async def test_a_body_that_never_ends_is_a_408(http: ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.http.middleware.BODY_S", 0.01)
    ended = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await ended.wait()

    async with http.post("/v1/responses", data=body()) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (408, "request_timeout")
    ended.set()
