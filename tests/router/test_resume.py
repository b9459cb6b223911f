"""A client that lost its connection reads on, over HTTP and over a WebSocket: the same events, byte for byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse
from openai import APIError, AsyncOpenAI, BadRequestError, InternalServerError, NotFoundError

from core.stream import Failure
from router.http.chat import _closing
from router.http.outbox import Outbox
from router.http.sse import SseReader, stopped, unnamed
from tests.router.fakes import BODY, CHAT, MODEL, FakeRouter, failing, saying, with_key
from tests.router.reading import TEXTS, Spoken, Stream, after, asking, client, data, until, whole

EVENTS = 8 + len(TEXTS)
"""created, in_progress, item and part added, the deltas, text, part and item done, completed."""


@pytest.fixture
async def http() -> AsyncIterator[ClientSession]:
    async with client() as session:
        yield session


@pytest.fixture
async def bob() -> AsyncIterator[ClientSession]:
    async with client("bob") as session:
        yield session


async def read(http: ClientSession, url: str) -> list[bytes]:
    async with http.get(url) as answer:
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        return await Stream(answer).rest()


async def error_of(http: ClientSession, url: str, method: str = "GET") -> tuple[int, dict[str, Any]]:
    async with http.request(method, url) as answer:
        return answer.status, (await answer.json())["error"]


# -- the events --------------------------------------------------------------------------------


async def test_after_the_end_every_replay_is_the_tail_of_the_first_delivery_byte_for_byte(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu").come_up()
    response_id, first = await whole(router, http)
    assert len(first) == EVENTS
    assert await read(http, after(router, response_id)) == first
    for number in range(EVENTS):
        two = await asyncio.gather(*[read(http, after(router, response_id, number))] * 2)
        assert two == [first[number + 1 :]] * 2


async def test_while_it_runs_readers_from_everywhere_get_the_tail_of_the_first_delivery_byte_for_byte(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu").come_up()
    async with AsyncExitStack() as stack:
        spoken, stream = await stack.enter_async_context(asking(router, http))
        readers: list[tuple[int, Stream]] = []
        first = await stream.take(2)
        for word in range(len(TEXTS)):
            spoken.say()
            first += await stream.take(3 if word == 0 else 1)
            for number in [-1, *range(len(first))]:
                url = after(router, spoken.id, number if number >= 0 else None)
                answer = await stack.enter_async_context(http.get(url))
                assert answer.headers["x-edge-node"] == "eu"
                readers.append((number, Stream(answer)))
        spoken.finish()
        first += await stream.rest()
        assert len(first) == EVENTS
        assert len(readers) > 3 * len(TEXTS)
        for number, reader in readers:
            assert await reader.rest() == first[number + 1 :]


async def test_a_reader_that_comes_back_keeps_the_answer_alive_and_one_that_leaves_disturbs_nobody(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu").come_up()
    async with asking(router, http) as (spoken, stream):
        spoken.say(2)
        first = await stream.take(5)
    async with http.get(after(router, spoken.id, 4)) as answer:
        await until(lambda: len(router.context.sessions._table[spoken.id].readers) == 1)
        router.wait_s(60)  # longer than anybody's absence is borne
        async with http.get(after(router, spoken.id)):
            pass
        spoken.finish()
        first += await Stream(answer).rest()
    assert await read(http, after(router, spoken.id)) == first
    assert router.links.cancels.empty()


async def test_what_has_ended_names_no_node(router: FakeRouter, http: ClientSession) -> None:
    router.links.node("eu").come_up()
    response_id, _ = await whole(router, http)
    async with http.get(after(router, response_id)) as answer:
        assert "x-edge-node" not in answer.headers


async def test_a_retrieved_response_that_runs_is_one_object_unless_a_stream_is_asked_for(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu").come_up()
    async with asking(router, http) as (spoken, stream):
        spoken.say()
        await stream.take(5)
        for query in ("", "?stream=false", "?stream=False&starting_after=1", "?include_obfuscation=false"):
            async with http.get(f"{router.url}/v1/responses/{spoken.id}{query}") as answer:
                assert ((await answer.json())["status"], answer.content_type) == ("in_progress", "application/json")


# -- the real SDK ------------------------------------------------------------------------------


async def test_the_sdk_resumes_with_starting_after(router: FakeRouter, http: ClientSession) -> None:
    router.links.node("eu").come_up()
    async with AsyncOpenAI(base_url=f"{router.url}/v1", api_key="alice", max_retries=0) as sdk:
        async with asking(router, http) as (spoken, stream):
            spoken.say(2)
            await stream.take(6)
            resumed = await sdk.responses.retrieve(spoken.id, stream=True, starting_after=4)
            spoken.finish()
            events = [event async for event in resumed]
        assert [event.sequence_number for event in events] == list(range(5, EVENTS))
        assert events[-1].type == "response.completed"
        assert events[-1].response.output_text == "".join(TEXTS)
        again = [event async for event in await sdk.responses.retrieve(spoken.id, stream=True)]
        assert again[5:] == events
        with pytest.raises(BadRequestError) as caught:
            await sdk.responses.retrieve(spoken.id, stream=True, starting_after=EVENTS)
        assert caught.value.param == "starting_after"
        with pytest.raises(NotFoundError):
            await sdk.responses.retrieve("resp_t_0", stream=True)


# -- what cannot be read on from ---------------------------------------------------------------


@pytest.mark.parametrize("number", ["-1", "x", "", "1.5", "1e3", "+1", "0x1", "9" * 400, "99999999999999999999", "²"])
async def test_a_number_that_is_none_is_refused_by_its_name(
    router: FakeRouter, http: ClientSession, number: str
) -> None:
    router.links.node("eu").come_up()
    response_id, _ = await whole(router, http)
    url = f"{router.url}/v1/responses/{response_id}"
    async with http.get(url, params={"stream": "true", "starting_after": number}) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["code"], error["param"]) == (400, "invalid_request", "starting_after")
    assert len(error["message"]) < 250


async def test_nobody_can_have_seen_what_was_not_said(router: FakeRouter, http: ClientSession) -> None:
    router.links.node("eu").come_up()
    async with asking(router, http) as (spoken, stream):
        spoken.say()
        first = await stream.take(5)
        status, running = await error_of(http, after(router, spoken.id, 5))
        spoken.finish()
        first += await stream.rest()
    assert (status, running["param"]) == (400, "starting_after")
    status, ended = await error_of(http, after(router, spoken.id, EVENTS))
    assert (status, ended["param"]) == (400, "starting_after")
    assert "the latest event is 11" in ended["message"]


@pytest.mark.parametrize("stream", ["1", "yes", "", "tru"])
async def test_a_stream_that_is_neither_true_nor_false_is_refused_by_its_name(
    router: FakeRouter, http: ClientSession, stream: str
) -> None:
    status, error = await error_of(http, f"{router.url}/v1/responses/resp_t_0?stream={stream}")
    assert (status, error["param"]) == (400, "stream")


# -- cancel and delete -------------------------------------------------------------------------


async def test_a_response_that_is_deleted_ends_for_its_readers_and_is_forgotten(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu").come_up()
    async with asking(router, http) as (spoken, stream), http.get(after(router, spoken.id)) as answer:
        spoken.say()
        async with http.delete(f"{router.url}/v1/responses/{spoken.id}") as deleted:
            assert await deleted.json() == {"id": spoken.id, "object": "response", "deleted": True}
        first, resumed = await stream.rest(), await Stream(answer).rest()
        assert first == resumed
        assert data(first[-1])["type"] == "response.incomplete"
    assert (await error_of(http, after(router, spoken.id)))[0] == 404
    assert (router.store.kept, router.store.database.running) == ({}, {})


async def test_what_is_cancelled_is_answered_as_it_ended_and_can_be_replayed(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu").come_up()
    async with asking(router, http) as (spoken, stream):
        spoken.say()
        async with http.post(f"{router.url}/v1/responses/{spoken.id}/cancel") as answer:
            cancelled = await answer.json()
        first = await stream.rest()
    assert (cancelled["status"], cancelled) == ("cancelled", data(first[-1])["response"])
    assert await read(http, after(router, spoken.id)) == first


async def test_what_is_not_stored_is_found_by_nobody_but_can_be_cancelled(
    router: FakeRouter, http: ClientSession, anyone: ClientSession
) -> None:
    router.links.node("eu").come_up()
    async with asking(router, http, store=False) as (spoken, stream):
        spoken.say()
        url = f"{router.url}/v1/responses/{spoken.id}"
        for method, query in [("GET", ""), ("GET", "?stream=true"), ("DELETE", "")]:
            status, error = await error_of(http, url + query, method)
            assert (status, error["code"]) == (404, "response_not_found")
        async with anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=with_key("alice")) as socket:
            await socket.send_json({"type": "edgechat:resume", "response_id": spoken.id})
            assert (await socket.receive_json(timeout=10))["code"] == "response_not_found"
        assert (await error_of(http, url.replace(spoken.id, "resp_t_0") + "/cancel", "POST"))[0] == 404
        async with http.post(url + "/cancel") as answer:
            assert (await answer.json())["status"] == "cancelled"
        assert data((await stream.rest())[-1])["type"] == "response.incomplete"


# -- isolation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("GET", "?stream=true"),
        ("GET", "?stream=true&starting_after=99"),
        ("DELETE", ""),
        ("POST", "/cancel"),
    ],
)
async def test_another_tenants_response_is_exactly_an_unknown_one(
    router: FakeRouter, http: ClientSession, bob: ClientSession, running: bool, method: str, path: str
) -> None:
    router.links.node("eu").come_up()
    async with asking(router, http) as (spoken, stream):
        if not running:
            spoken.finish()
            await stream.rest()
        unknown = spoken.id[:-4] + "0000"
        answers = []
        for response_id in (spoken.id, unknown):
            async with bob.request(method, f"{router.url}/v1/responses/{response_id}{path}") as answer:
                headers = {name: value for name, value in answer.headers.items() if name.lower() != "x-request-id"}
                headers.pop("Date")
                answers.append((answer.status, headers, (await answer.text()).replace(response_id, "ID")))
        assert answers[0] == answers[1]
        assert answers[0][0] == 404
        if running:
            spoken.finish()
            await stream.rest()
    assert len(await read(http, after(router, spoken.id))) == EVENTS


# -- over a WebSocket --------------------------------------------------------------------------


async def resume(socket: ClientWebSocketResponse, response_id: Any, **fields: Any) -> None:
    await socket.send_json({"type": "edgechat:resume", "response_id": response_id} | fields)


async def receive(socket: ClientWebSocketResponse, count: int) -> list[dict[str, Any]]:
    return [await socket.receive_json(timeout=10) for _ in range(count)]


async def test_a_web_socket_gets_every_tail_while_it_runs_and_after_the_end(
    router: FakeRouter, http: ClientSession, socket: ClientWebSocketResponse
) -> None:
    router.links.node("eu").come_up()
    async with asking(router, http) as (spoken, stream):
        spoken.say(2)
        first = [data(event) for event in await stream.take(6)]
        for number in range(6):
            await resume(socket, spoken.id, starting_after=number, stream_id=f"lane {number}")
        await until(lambda: len(router.context.sessions._table[spoken.id].readers) == 7)
        spoken.finish()
        first += [data(event) for event in await stream.rest()]
    tails: dict[str, list[dict[str, Any]]] = {}
    for event in await receive(socket, sum(EVENTS - number - 1 for number in range(6))):
        tails.setdefault(event.pop("stream_id"), []).append(event)
    assert tails == {f"lane {number}": first[number + 1 :] for number in range(6)}
    for number in range(EVENTS):
        await resume(socket, spoken.id, starting_after=number)
        assert await receive(socket, EVENTS - number - 1) == first[number + 1 :]
    await resume(socket, spoken.id)
    assert await receive(socket, EVENTS) == first


async def test_a_resume_takes_its_turn_in_its_lane(
    router: FakeRouter, http: ClientSession, socket: ClientWebSocketResponse
) -> None:
    router.links.node("eu").come_up()
    response_id, first = await whole(router, http)
    await socket.send_json({"type": "response.create"} | BODY)
    await resume(socket, response_id)
    await resume(socket, response_id, stream_id="other")
    begun = await receive(socket, 2 + EVENTS)
    assert [event["type"] for event in begun if "stream_id" not in event] == [
        "response.created",
        "response.in_progress",
    ]
    Spoken(*await router.links.generates.get(), "Hi").finish()
    events = await receive(socket, 7 + EVENTS)
    assert [event["type"] for event in events].index("response.completed") == 6
    assert events[7:] == [data(event) for event in first]


async def test_who_asked_for_extensions_is_told_first_which_node_answers(
    router: FakeRouter, http: ClientSession, anyone: ClientSession
) -> None:
    router.links.node("eu").come_up()
    async with (
        asking(router, http) as (spoken, stream),
        anyone.ws_connect(
            f"{router.ws_url}/v1/responses",
            headers=with_key("alice"),
            protocols=("responses.v1.json", "edgechat.ext.v1"),
        ) as socket,
    ):
        spoken.say()
        await stream.take(5)
        await resume(socket, spoken.id, starting_after=3, stream_id="a")
        node, event = await receive(socket, 2)
        assert node == {
            "type": "edgechat:node",
            "response_id": spoken.id,
            "node": "eu",
            "region": "region-eu",
            "stream_id": "a",
        }
        assert event["sequence_number"] == 4
        spoken.finish()
        await receive(socket, EVENTS - 5)
        await resume(socket, spoken.id, starting_after=EVENTS - 2)
        assert [event["type"] for event in await receive(socket, 1)] == ["response.completed"]


@pytest.mark.parametrize("who", ["alice", "bob"])
async def test_an_id_that_cannot_be_resumed_is_an_error_on_its_lane_and_the_lane_goes_on(
    router: FakeRouter, http: ClientSession, anyone: ClientSession, who: str
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    async with http.post(f"{router.url}/v1/responses", json=BODY) as answer:
        made = (await answer.json())["id"]
    asked = "resp_t_0" if who == "alice" else made
    async with anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=with_key(who)) as socket:
        await resume(socket, asked, stream_id="a")
        error = await socket.receive_json(timeout=10)
        assert (error["type"], error["status"], error["code"]) == ("error", 404, "response_not_found")
        assert (error["param"], error["stream_id"]) == ("response_id", "a")
        await socket.send_json({"type": "response.create", "stream_id": "a"} | BODY)
        assert (await socket.receive_json(timeout=10))["type"] == "response.created"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "response_id"),
        ({"response_id": 7}, "response_id"),
        ({"response_id": "resp_t_0", "starting_after": -1}, "starting_after"),
        ({"response_id": "resp_t_0", "starting_after": "1"}, "starting_after"),
        ({"response_id": "resp_t_0", "starting_after": True}, "starting_after"),
        ({"response_id": "resp_t_0", "starting_after": 1.5}, "starting_after"),
        ({"response_id": "resp_t_0", "starting_after": 2**64}, "starting_after"),
        ({"response_id": "resp_t_0", "stream_id": "x" * 129}, "stream_id"),
    ],
)
async def test_a_resume_that_cannot_be_understood_names_its_field(
    router: FakeRouter, socket: ClientWebSocketResponse, fields: dict[str, Any], param: str
) -> None:
    await socket.send_json({"type": "edgechat:resume"} | fields)
    error = await socket.receive_json(timeout=10)
    assert (error["type"], error["status"], error["param"]) == ("error", 400, param)


async def test_what_runs_can_be_cancelled_over_another_web_socket_and_what_ended_cannot(
    router: FakeRouter, http: ClientSession, socket: ClientWebSocketResponse
) -> None:
    router.links.node("eu").come_up()
    async with asking(router, http) as (spoken, stream):
        spoken.say()
        await socket.send_json({"type": "response.cancel", "response_id": spoken.id})
        assert data((await stream.rest())[-1])["response"]["status"] == "cancelled"
    await socket.send_json({"type": "response.cancel", "response_id": spoken.id})
    assert (await socket.receive_json(timeout=10))["code"] == "response_not_found"


# -- a stream that stops without an end --------------------------------------------------------


async def test_readers_are_told_when_a_stream_stops_here_and_get_the_rest_later(
    router: FakeRouter, http: ClientSession, socket: ClientWebSocketResponse
) -> None:
    router.links.node("eu").come_up()
    async with asking(router, http) as (spoken, stream):
        spoken.say(2)
        first = await stream.take(6)
        await resume(socket, spoken.id, starting_after=5)
        async with AsyncOpenAI(base_url=f"{router.url}/v1", api_key="alice", max_retries=0) as sdk:
            resumed = await sdk.responses.retrieve(spoken.id, stream=True, starting_after=4)
            await until(lambda: len(router.context.sessions._table[spoken.id].readers) == 3)
            router.store.full = True
            spoken.say()
            with pytest.raises(APIError, match="store cannot be used") as caught:
                [event async for event in resumed]
            assert caught.value.code == "store_unavailable"
        (last,) = await stream.rest()
    assert last.startswith(b"event: error\n")
    error = data(last)
    assert (error["code"], error["status"], error["retry_after_ms"]) == ("store_unavailable", 503, 2000)
    told = await socket.receive_json(timeout=10)
    assert {name: told[name] for name in ("type", "code", "retry_after_ms")} == {
        "type": "error",
        "code": "store_unavailable",
        "retry_after_ms": 2000,
    }

    router.store.full = False
    async with http.get(after(router, spoken.id, 5)) as answer:
        node, frame = await router.links.generates.get()
        assert frame.output_ids == [100, 101]
        Spoken(node, frame, *TEXTS).finish()
        first += await Stream(answer).rest()
    assert [data(event)["sequence_number"] for event in first] == list(range(EVENTS))
    assert await read(http, after(router, spoken.id)) == first


async def test_who_waits_for_the_whole_gets_the_status(router: FakeRouter, http: ClientSession) -> None:
    router.links.node("eu").come_up()
    waiting = asyncio.create_task(http.post(f"{router.url}/v1/responses", json=BODY))
    spoken = Spoken(*await router.links.generates.get(), *TEXTS)
    spoken.say(2)
    await until(lambda: bool(router.store.database.running))
    router.store.full = True
    spoken.say()
    async with await waiting as answer:
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert (await answer.json())["error"]["code"] == "store_unavailable"


def test_a_stream_that_stops_says_why_in_each_dialect() -> None:
    reader = SseReader(Outbox(None, lambda: 0.0, most_bytes=1, most_s=1.0, on_cut=lambda: None), unnamed)
    reader.on_events([{"type": "response.created"}])
    assert stopped(reader) == b""
    reader.on_refused(Failure("response_moved", "Resume it.", retryable=True))
    assert stopped(reader).startswith(
        b'event: error\ndata: {"type":"error","sequence_number":0,"code":"response_moved"'
    )
    assert data(stopped(reader))["retry_after_ms"] == 2000
    assert data(_closing(reader)) == {
        "error": {"message": "Resume it.", "type": "server_error", "param": None, "code": "response_moved"}
    }


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["responses", "chat/completions"])
async def test_a_request_that_kills_engines_is_not_sent_again(router: FakeRouter, path: str, stream: bool) -> None:
    router.links.node("eu", failing("poisoned_request", "It killed two engines.")).come_up()
    body = BODY | CHAT | {"stream": stream}
    async with client() as http, http.post(f"{router.url}/v1/{path}", json=body) as answer:
        assert (answer.status, answer.headers["x-should-retry"]) == (500, "false")
        assert "retry-after" not in answer.headers
    async with AsyncOpenAI(base_url=f"{router.url}/v1", api_key="alice", max_retries=2) as sdk:
        with pytest.raises(InternalServerError):
            await sdk.responses.create(model=MODEL, input="x")
    assert router.links.generates.qsize() == 2
