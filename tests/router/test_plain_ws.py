"""The plain dialect over WebSocket: text in, reply out."""

from __future__ import annotations

import json

import pytest
from aiohttp import ClientSession

from tests.router.fakes import FakeRouter, saying

KEY = {"Authorization": "Bearer alice"}


async def test_the_plain_dialect_replies_and_remembers_the_connections_conversation(
    router: FakeRouter, anyone: ClientSession
) -> None:
    router.links.node("eu", saying("Hello", ".")).come_up()
    offered = ("edgechat.plain.v1", "openai-insecure-api-key.alice")
    async with anyone.ws_connect(f"{router.ws_url}/ws", protocols=offered) as socket:
        assert socket.protocol == "edgechat.plain.v1"
        await socket.send_str('{"text":"hi"}')
        assert await socket.receive_json(timeout=10) == {"reply": "Hello."}
        await socket.send_str('{"text":"again"}')
        await socket.receive_json(timeout=10)
    await router.links.generates.get()
    _, frame = await router.links.generates.get()
    assert [item.text for item in frame.items] == ["hi", "Hello.", "again"]
    assert frame.items[1].ids == [100, 101]
    assert router.store.kept == {}


@pytest.mark.parametrize("text", ["hi", "{}", '{"text": 1}', '{"text": "hi", "model": "gpt-9"}'])
async def test_the_plain_dialect_answers_nonsense_by_a_clear_error_and_stays(
    router: FakeRouter, anyone: ClientSession, text: str
) -> None:
    router.links.node("eu", saying("Hello")).come_up()
    async with anyone.ws_connect(f"{router.ws_url}/ws", headers=KEY) as socket:
        await socket.send_str(text)
        assert json.loads((await socket.receive(timeout=10)).data)["error"]["message"]
        await socket.send_str('{"text":"hi"}')
        assert await socket.receive_json(timeout=10) == {"reply": "Hello"}


async def test_the_plain_dialect_says_so_when_nothing_is_served(router: FakeRouter, anyone: ClientSession) -> None:
    async with anyone.ws_connect(f"{router.ws_url}/ws", headers=KEY) as socket:
        await socket.send_str('{"text":"hi"}')
        assert (await socket.receive_json(timeout=10))["error"]["code"] == "no_node_available"
