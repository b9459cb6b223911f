"""Plain HTTP: SSE and chat streams."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import ClientSession
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tests.router.fakes import BODY, CHAT, FakeRouter, failing, saying, with_key

SDK_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def parse_sse(text: str) -> list[tuple[str, str]]:
    """(event, data) of every block."""
    blocks = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        blocks.append((fields.get("event", ""), fields["data"]))
    return blocks


async def test_sse_carries_the_same_numbered_events_and_ends_with_the_terminal_one(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu", saying("Hi", " there")).come_up()
    async with http.post("/v1/responses", json=BODY | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert (answer.headers["x-edge-node"], answer.headers["cache-control"]) == ("eu", "no-cache")
        assert answer.headers["x-request-id"]
        blocks = parse_sse(await answer.text())
    events = [json.loads(data) for _, data in blocks]
    assert [name for name, _ in blocks] == [event["type"] for event in events]
    for event in events:
        SDK_EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "response.completed"


async def test_a_chat_stream_ends_with_done(router: FakeRouter, http: ClientSession) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    async with http.post("/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
        blocks = parse_sse(await answer.text())
    assert blocks[-1] == ("", "[DONE]")
    assert all(json.loads(data)["object"] == "chat.completion.chunk" for _, data in blocks[:-1])


@pytest.mark.parametrize(
    ("path", "body", "param"), [("/v1/responses", BODY, "input"), ("/v1/chat/completions", CHAT, "messages")]
)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_a_node_refuses_is_an_http_status_also_for_streams(
    router: FakeRouter, http: ClientSession, path: str, body: dict[str, object], param: str, stream: bool
) -> None:
    router.links.node("eu", failing("context_length_exceeded", "9000 tokens, 2048 fit.")).come_up()
    async with http.post(path, json=body | {"stream": stream}) as answer:
        assert answer.status == 400
        error = (await answer.json())["error"]
    assert (error["code"], error["param"], error["message"]) == (
        "context_length_exceeded",
        param,
        "9000 tokens, 2048 fit.",
    )


async def test_a_chat_stream_that_fails_midway_says_so_in_the_stream(router: FakeRouter, http: ClientSession) -> None:
    node = router.links.node("eu", lambda frame: saying("Hi", " there")(frame)[:2])
    node.come_up()
    async with http.post("/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
        await answer.content.readuntil(b"\n\n")
        node.go_down()
        router.wait_s(15.0)
        blocks = parse_sse((await answer.read()).decode())
    assert json.loads(blocks[-1][1])["error"]["code"] == "node_lost"


async def test_a_completion_that_a_stopping_router_cuts_off_is_no_finished_one(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu", lambda frame: saying("Hi", " there")(frame)[:2]).come_up()
    whole = asyncio.ensure_future(http.post("/v1/chat/completions", json=CHAT))
    unstored = asyncio.ensure_future(http.post("/v1/responses", json=BODY | {"store": False}))
    async with http.post("/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
        await answer.content.readuntil(b"\n\n")
        for _ in range(3):
            await router.links.generates.get()
        router.context.sessions.suspend()
        blocks = parse_sse((await answer.read()).decode())
    assert json.loads(blocks[-1][1])["error"]["code"] == "draining"
    assert not any('"finish_reason":"' in data for _, data in blocks)
    for pending in (whole, unstored):
        async with await pending as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "draining")
    assert router.links.cancels.qsize() == 3


async def test_an_id_of_ours_is_echoed_as_the_request_id(http: ClientSession) -> None:
    async with http.get("/v1/models", headers={"x-request-id": "mine-1"}) as answer:
        assert answer.headers["x-request-id"] == "mine-1"
    async with http.get("/v1/models", headers={"x-request-id": "no such; thing"}) as answer:
        assert answer.headers["x-request-id"].startswith("req_")


async def test_a_conversation_returns_to_the_node_that_remembers_it(router: FakeRouter, http: ClientSession) -> None:
    router.links.node("a", saying("Hi")).come_up()
    remembering = router.links.node("b", saying("Hi"))
    remembering.come_up()
    async with http.post("/v1/responses", json=BODY | {"instructions": "Be brief."}) as answer:
        first = await answer.json()
    node, turn = await router.links.generates.get()
    assert (node.url, len(turn.prefix_keys), len(turn.items)) == ("ws://a:1/link", 2, 2)
    remembering.status(chains=[(turn.prefix_keys[-1], 64)])
    again = BODY | {"instructions": "Be brief.", "previous_response_id": first["id"]}
    async with http.post("/v1/responses", json=again) as answer:
        assert answer.status == 200
    node, second = await router.links.generates.get()
    assert (node.url, second.prefix_keys[:2]) == (remembering.url, turn.prefix_keys)
    assert len(second.prefix_keys) == len(second.items) == 4


async def test_tenants_share_no_prefix_keys(router: FakeRouter) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    keys: list[list[str]] = []
    async with ClientSession(router.url) as client:
        for name in ("alice", "bob", "alice"):
            async with client.post("/v1/responses", json=BODY, headers=with_key(name)) as answer:
                assert answer.status == 200
            keys.append((await router.links.generates.get())[1].prefix_keys)
    assert keys[0] == keys[2] != keys[1]
