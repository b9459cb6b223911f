"""A response of another router: asked for here, answered there, and nothing believed that no router would say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
from aiohttp import ClientPayloadError, ClientSession, web
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI

from core.errors import EdgechatError, ResponseNotFound
from core.stream import EndRecord
from router.config import LinkSection, Listen, RouterSection, SessionSection
from router.errors import RouterUnreachable
from router.http.sse import COMMENT, named
from router.journal import Owned, StoredResponse, Unfinished
from router.peers import Peers, sse_data
from router.registry import RouterAddress
from tests.fake_store import FakeDatabase
from tests.router.fakes import (
    BODY,
    CONFIG,
    MODEL,
    FakeClock,
    FakeRouter,
    record,
    running_router,
    saying,
    with_key,
    words,
)
from tests.router.reading import TEXTS, Spoken, Stream, after, asking, client, data, introduce, routers, until, whole

TLS = Path(__file__).parent.parent / "edge_node/tls"
CERTIFICATE, PRIVATE_KEY = TLS / "cert.pem", TLS / "key.pem"
EVENTS = 8 + len(TEXTS)
ID = "resp_b_0"
Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
async def http() -> AsyncIterator[ClientSession]:
    async with client() as session:
        yield session


@pytest.fixture
async def pair() -> AsyncIterator[tuple[FakeRouter, FakeRouter]]:
    """The router `a`, which has a node, and `b`, which knows it."""
    async with routers("a", "b") as (a, b):
        a.links.node("eu").come_up()
        yield a, b


# -- through another router --------------------------------------------------------------------


async def test_the_events_through_another_router_are_those_of_the_first_delivery(
    pair: tuple[FakeRouter, FakeRouter], http: ClientSession
) -> None:
    a, b = pair
    async with asking(a, http) as (spoken, stream):
        spoken.say(2)
        first = await stream.take(6)
        async with http.get(after(b, spoken.id)) as everything, http.get(after(b, spoken.id, 4)) as tail:
            for answer in (everything, tail):
                assert (answer.status, answer.content_type, answer.headers["x-edge-node"]) == (
                    200,
                    "text/event-stream",
                    "eu",
                )
            through, rest = Stream(everything), Stream(tail)
            assert await through.take(6) == first
            assert await rest.take(1) == first[5:]
            for _ in TEXTS[2:]:  # live: each is there before the next is said
                spoken.say()
                (event,) = await stream.take(1)
                assert await through.next() == event
                assert await rest.next() == event
            spoken.finish()
            end = await stream.rest()
            assert await through.rest() == await rest.rest() == end
    first = await read_all(http, after(a, spoken.id))
    for number in range(EVENTS):
        assert await read_all(http, after(b, spoken.id, number)) == first[number + 1 :]


async def read_all(http: ClientSession, url: str) -> list[bytes]:
    async with http.get(url) as answer:
        assert answer.status == 200
        return await Stream(answer).rest()


async def test_the_sdk_can_do_everything_through_another_router(
    pair: tuple[FakeRouter, FakeRouter], http: ClientSession
) -> None:
    a, b = pair
    response_id, first = await whole(a, http)
    async with AsyncOpenAI(base_url=f"{b.url}/v1", api_key="alice", max_retries=0) as sdk:
        assert (await sdk.responses.retrieve(response_id)).output_text == "".join(TEXTS)
        resumed = [event async for event in await sdk.responses.retrieve(response_id, stream=True, starting_after=3)]
        assert [event.sequence_number for event in resumed] == list(range(4, EVENTS))
        assert (await sdk.responses.cancel(response_id)).status == "completed"
        b.links.node("us", saying("Hi")).come_up()
        second = await sdk.responses.create(model=MODEL, input="And?", previous_response_id=response_id)
        assert second.id.startswith("resp_b_")
        _, frame = await b.links.generates.get()
        assert [item.text for item in frame.items] == ["hi", "".join(TEXTS), "And?"]
        assert frame.items[1].ids == [100, 101, 102, 103], "what was generated is what is read again"
        await sdk.responses.delete(response_id)
    assert a.store.kept == {}
    async with http.get(f"{a.url}/v1/responses/{response_id}") as answer:
        assert answer.status == 404
    assert len(first) == EVENTS


async def test_what_runs_elsewhere_is_cancelled_and_deleted_there(
    pair: tuple[FakeRouter, FakeRouter], http: ClientSession, anyone: ClientSession
) -> None:
    a, b = pair
    async with asking(a, http) as (spoken, stream):
        spoken.say()
        async with http.post(f"{b.url}/v1/responses/{spoken.id}/cancel") as answer:
            assert (await answer.json())["status"] == "cancelled"
        assert data((await stream.rest())[-1])["response"]["status"] == "cancelled"
    async with (
        asking(a, http) as (spoken, stream),
        anyone.ws_connect(f"{b.ws_url}/v1/responses", headers=with_key("alice")) as socket,
    ):
        await socket.send_json({"type": "response.cancel", "response_id": spoken.id})
        assert data((await stream.rest())[-1])["response"]["status"] == "cancelled"
        await socket.send_json({"type": "response.cancel", "response_id": "resp_a_0"})
        assert (await socket.receive_json(timeout=10))["code"] == "response_not_found"
    async with asking(a, http) as (spoken, stream), http.get(after(b, spoken.id)) as resumed:
        async with http.delete(f"{b.url}/v1/responses/{spoken.id}") as answer:
            assert (await answer.json())["deleted"] is True
        assert await stream.rest() == await Stream(resumed).rest()
    assert len(a.store.kept) == 2


async def test_a_previous_response_that_still_runs_elsewhere_is_not_found(
    pair: tuple[FakeRouter, FakeRouter], http: ClientSession
) -> None:
    a, b = pair
    b.links.node("us", saying("Hi")).come_up()
    async with asking(a, http) as (spoken, _):
        body = BODY | {"previous_response_id": spoken.id}
        async with http.post(f"{b.url}/v1/responses", json=body) as answer:
            error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (400, "previous_response_not_found")
        spoken.finish()


async def test_a_web_socket_resumes_what_runs_elsewhere(
    pair: tuple[FakeRouter, FakeRouter], http: ClientSession, anyone: ClientSession
) -> None:
    a, b = pair
    b.links.node("eu").come_up()
    both = ("responses.v1.json", "edgechat.ext.v1")
    async with (
        asking(a, http) as (spoken, stream),
        anyone.ws_connect(f"{b.ws_url}/v1/responses", headers=with_key("alice"), protocols=both) as socket,
    ):
        spoken.say(2)
        first = await stream.take(6)
        resume = {"type": "edgechat:resume", "response_id": spoken.id, "starting_after": 3, "stream_id": "x"}
        await socket.send_json(resume)
        node = await socket.receive_json(timeout=10)
        assert (node["type"], node["node"], node["region"]) == ("edgechat:node", "eu", "region-eu")
        spoken.finish()
        first += await stream.rest()
        lane = {"stream_id": "x"}
        for event in first[4:]:
            assert json.loads(await socket.receive_str(timeout=10)) == data(event) | lane
        await socket.send_json(resume | {"starting_after": EVENTS})
        error = await socket.receive_json(timeout=10)
        assert (error["status"], error["param"], error["stream_id"]) == (400, "starting_after", "x")


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
async def test_another_tenants_response_elsewhere_is_exactly_an_unknown_one(
    pair: tuple[FakeRouter, FakeRouter], http: ClientSession, method: str, path: str
) -> None:
    a, b = pair
    response_id, _ = await whole(a, http)
    here, there = "resp_b_000000000000000000000000", "resp_a_000000000000000000000000"
    answers = []
    async with client("bob") as bob:
        for asked in (response_id, there, here):
            async with bob.request(method, f"{b.url}/v1/responses/{asked}{path}") as answer:
                names = sorted(name.lower() for name in answer.headers)
                answers.append((answer.status, names, (await answer.text()).replace(asked, "ID")))
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0] == 404
    assert len(a.store.kept) == 1


@pytest.mark.parametrize("path", ["", "?stream=true", "/cancel"])
async def test_an_answer_from_elsewhere_has_the_head_of_one_from_here(
    pair: tuple[FakeRouter, FakeRouter], http: ClientSession, path: str
) -> None:
    a, b = pair
    response_id, _ = await whole(a, http)
    heads = []
    for router in (a, b):
        url, headers = f"{router.url}/v1/responses/{response_id}{path}", {"x-request-id": "mine"}
        async with http.request("POST" if path == "/cancel" else "GET", url, headers=headers) as answer:
            assert answer.status == 200
            heads.append({name.lower(): value for name, value in answer.headers.items() if name != "Date"})
    assert heads[0] == heads[1]
    assert heads[0]["x-request-id"] == "mine"


async def test_a_client_that_leaves_ends_what_was_asked_for_it(
    pair: tuple[FakeRouter, FakeRouter], http: ClientSession, anyone: ClientSession
) -> None:
    a, b = pair
    async with asking(a, http) as (spoken, _):
        readers = a.context.sessions._table[spoken.id].readers
        async with http.get(after(b, spoken.id)) as answer:
            await Stream(answer).take(2)
            assert len(readers) == 2
        await until(lambda: len(readers) == 1)
        async with anyone.ws_connect(f"{b.ws_url}/v1/responses", headers=with_key("alice")) as socket:
            await socket.send_json({"type": "edgechat:resume", "response_id": spoken.id})
            await socket.receive_json(timeout=10)
            assert len(readers) == 2
        await until(lambda: len(readers) == 1)
        spoken.finish()


async def test_a_router_that_dies_cuts_the_streams_it_gave_through_others(
    pair: tuple[FakeRouter, FakeRouter], http: ClientSession, anyone: ClientSession
) -> None:
    a, b = pair
    async with (
        asking(a, http) as (spoken, _),
        http.get(after(b, spoken.id)) as answer,
        anyone.ws_connect(f"{b.ws_url}/v1/responses", headers=with_key("alice")) as socket,
    ):
        await socket.send_json({"type": "edgechat:resume", "response_id": spoken.id, "stream_id": "x"})
        await socket.receive_json(timeout=10)
        await socket.receive_json(timeout=10)
        stream = Stream(answer)
        assert [data(event)["type"] for event in await stream.take(2)] == ["response.created", "response.in_progress"]
        for connection in list(a.context.clients()):
            assert connection.transport is not None
            connection.transport.abort()
        with pytest.raises(ClientPayloadError):  # no orderly end, which could be taken for the response's
            await stream.next()
        error = await socket.receive_json(timeout=10)
        assert (error["type"], error["code"], error["stream_id"]) == ("error", "router_unreachable", "x")
        assert error["retry_after_ms"] == 2000


async def test_a_router_that_stops_in_order_says_so_and_another_that_shares_its_store_goes_on(
    http: ClientSession, anyone: ClientSession
) -> None:
    clock = FakeClock()
    database = FakeDatabase(clock=lambda: clock.mono_s)
    async with routers("b", database=database) as (b,):
        b.store.beat_now(clock.mono_s)
        b.links.node("us").come_up()
        async with routers("a", database=database) as (a,):
            a.store.beat_now(clock.mono_s)
            a.links.node("eu").come_up()
            introduce({"a": a, "b": b})
            async with asking(a, http) as (spoken, stream):
                spoken.say(2)
                first = await stream.take(6)
                async with (
                    http.get(after(b, spoken.id, 5)) as answer,
                    anyone.ws_connect(f"{b.ws_url}/v1/responses", headers=with_key("alice")) as socket,
                ):
                    await socket.send_json({"type": "edgechat:resume", "response_id": spoken.id, "starting_after": 4})
                    await socket.receive_json(timeout=10)
                    a.context.sessions.suspend()
                    (last,) = await Stream(answer).rest()
                    assert (data(last)["type"], data(last)["code"]) == ("error", "draining")
                    assert (await socket.receive_json(timeout=10))["code"] == "draining"
                    await a.context.keeper.drain()
        # Its lease is not over yet: it may only be slow.
        async with http.get(after(b, spoken.id, 5)) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "router_unreachable")
            assert int(answer.headers["retry-after"]) >= 1
        clock.mono_s += 60
        b.store.beat_now(clock.mono_s)
        async with http.get(after(b, spoken.id, 5)) as answer:
            node, frame = await b.links.generates.get()
            assert frame.output_ids == [100, 101]
            Spoken(node, frame, *TEXTS).finish()
            first += await Stream(answer).rest()
        assert await read_all(http, after(b, spoken.id)) == first
        assert len(first) == EVENTS


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("GET", "?stream=true"), ("DELETE", ""), ("POST", "/cancel")]
)
async def test_a_router_that_is_gone_is_a_503_that_can_be_tried_again(
    http: ClientSession, method: str, path: str
) -> None:
    async with routers("b") as (b,):
        b.context.routers.set_addresses([RouterAddress("a", "http://127.0.0.1:1")])
        async with http.request(method, f"{b.url}/v1/responses/resp_a_0{path}") as answer:
            error = (await answer.json())["error"]
        assert (answer.status, error["code"], answer.headers["retry-after"]) == (503, "router_unreachable", "2")
        assert "127.0.0.1" not in error["message"]
        b.links.node("us").come_up()
        body = BODY | {"previous_response_id": "resp_a_0"}
        async with http.post(f"{b.url}/v1/responses", json=body) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "router_unreachable")


async def test_the_edges_list_the_other_routers_by_name(
    pair: tuple[FakeRouter, FakeRouter], http: ClientSession
) -> None:
    a, b = pair
    async with http.get(f"{b.url}/v1/edges") as answer:
        edges = await answer.json()
    assert (edges["router"], edges["routers"]) == ("b", [{"name": "a", "url": a.url}])


# -- what no router would say ------------------------------------------------------------------


@asynccontextmanager
async def impostor(handler: Handler) -> AsyncIterator[str]:
    """A server that answers every request with `handler`; yields its URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def peers_of(handler: Handler, secret: str = "secret") -> AsyncIterator[Peers]:
    """Peers that know `b`, which is an impostor."""
    async with impostor(handler) as url:
        peers = Peers(secret)
        peers.set_addresses([RouterAddress("b", url)])
        try:
            yield peers
        finally:
            await peers.close()


def saying_only(status: int, body: str | bytes, content_type: str, **headers: str) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        raw = body.encode() if isinstance(body, str) else body
        return web.Response(status=status, body=raw, content_type=content_type, headers=headers)

    return handler


def streaming(*pieces: bytes, hang: bool = False) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if hang:
            await asyncio.Event().wait()  # for ever, as far as the other side can tell
        return response

    return handler


def stored(response_id: str = ID, tenant: str = "acme") -> StoredResponse:
    ids, deltas = words("one")
    made = msgspec.structs.replace(record(), id=response_id, tenant=tenant)
    return StoredResponse(made, ids, deltas, EndRecord(status="completed", completed_at=1001))


def event(number: int, type_: str = "response.output_text.delta") -> bytes:
    return named({"type": type_, "sequence_number": number})


JSON = "application/json"
NONSENSE = {
    "a page": saying_only(200, "<html>", "text/html"),
    "a page that says it is JSON": saying_only(200, "<html>", JSON),
    "a list": saying_only(200, "[]", JSON),
    "nothing": saying_only(200, "", JSON),
    "no content": saying_only(204, "", JSON),
    "a redirect": saying_only(307, "{}", JSON, location="/elsewhere"),
    "a redirect that is a refusal": saying_only(307, '{"error": {"message": "no", "code": "draining"}}', JSON),
    "an error page": saying_only(502, "bad gateway", "text/plain"),
    "an error of another shape": saying_only(500, '{"error": "no"}', JSON),
    "an error without a code": saying_only(404, '{"error": {"message": "no"}}', JSON),
    "no internal paths": saying_only(404, '{"error": {"message": "no", "code": "not_found"}}', JSON),
    "no MessagePack": saying_only(200, b"\xc1", "application/msgpack"),
    "another tenant's record": saying_only(200, msgspec.msgpack.encode(stored(tenant="other")), "application/msgpack"),
    "another record": saying_only(200, msgspec.msgpack.encode(stored("resp_b_1")), "application/msgpack"),
}


@pytest.mark.parametrize("handler", NONSENSE.values(), ids=NONSENSE)
async def test_what_no_router_would_answer_is_no_answer(handler: Handler, http: ClientSession) -> None:
    async with peers_of(handler) as peers:
        for asking in (peers.record("b", "acme", ID), peers.cancel("b", "acme", ID), _events(peers)):
            with pytest.raises(RouterUnreachable):
                await asking
    async with impostor(handler) as url, routers("a") as (a,):
        a.context.routers.set_addresses([RouterAddress("b", url)])
        for method, path in [("GET", ""), ("GET", "?stream=true"), ("DELETE", ""), ("POST", "/cancel")]:
            async with http.request(method, f"{a.url}/v1/responses/{ID}{path}") as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (503, "router_unreachable")


async def _events(peers: Peers, starting_after: int = -1) -> list[dict[str, Any]]:
    async with peers.events("b", "acme", ID, starting_after) as following:
        return [event async for event in following.events]


BROKEN = {
    "without an end": streaming(event(0), event(1)),
    "with nothing": streaming(),
    "with a gap": streaming(event(0), event(2), event(3, "response.completed")),
    "from elsewhere": streaming(event(7, "response.completed")),
    "said twice": streaming(event(0), event(0)),
    "without numbers": streaming(b'data: {"type": "response.completed"}\n\n'),
    "no JSON": streaming(b"data: {\n\n"),
    "half an event": streaming(event(0), event(1, "response.completed")[:-1]),
}


@pytest.mark.parametrize("handler", BROKEN.values(), ids=BROKEN)
async def test_a_stream_that_is_not_a_responses_is_a_broken_one(handler: Handler) -> None:
    async with peers_of(handler) as peers:
        with pytest.raises(RouterUnreachable):
            await _events(peers)


async def test_events_are_read_from_where_they_were_asked_for_to_the_end_and_no_further() -> None:
    pieces = [COMMENT, event(3), COMMENT, event(4, "response.incomplete"), event(5)]
    async with peers_of(streaming(*pieces)) as peers:
        assert [said["sequence_number"] for said in await _events(peers, starting_after=2)] == [3, 4]


async def test_a_stream_of_what_has_been_read_to_its_end_is_empty(
    pair: tuple[FakeRouter, FakeRouter], http: ClientSession
) -> None:
    a, b = pair
    response_id, _ = await whole(a, http)
    async with b.context.routers.events("a", "acme", response_id, EVENTS - 1) as following:
        assert [said async for said in following.events] == []


async def test_a_stream_that_was_stopped_says_why() -> None:
    error = named({"type": "error", "sequence_number": 0, "code": "response_moved", "message": "Resume it."})
    async with peers_of(streaming(event(0), error)) as peers:
        with pytest.raises(EdgechatError, match="Resume it") as caught:
            await _events(peers)
    assert (caught.value.code, caught.value.status, caught.value.retryable) == ("response_moved", 503, True)


async def test_a_router_that_falls_silent_is_given_up(http: ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.peers.LEASE_S", 0.1)
    monkeypatch.setattr("router.peers.ANSWER_S", 0.1)
    handler = streaming(event(0), hang=True)
    async with peers_of(handler) as peers:
        with pytest.raises(RouterUnreachable):
            await _events(peers)
        for asking in (peers.record("b", "acme", ID), peers.cancel("b", "acme", ID)):
            with pytest.raises(RouterUnreachable):
                await asking
    async with impostor(handler) as url, routers("a") as (a,):
        a.context.routers.set_addresses([RouterAddress("b", url)])
        async with http.get(after(a, ID)) as answer:
            stream = Stream(answer)
            await stream.take(1)
            with pytest.raises(ClientPayloadError):
                await stream.next()


@pytest.mark.parametrize("size", [1, 100])
async def test_what_is_larger_than_any_answer_is_not_read_to_its_end(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.peers.MAX_ANSWER_BYTES", 1000)
    huge = saying_only(200, msgspec.msgpack.encode(stored()) + b"\0" * 1000 * size, "application/msgpack")
    async with peers_of(huge) as peers:
        with pytest.raises(RouterUnreachable):
            await peers.record("b", "acme", ID)
    async with peers_of(streaming(*[b"data: xxx" * 10] * 20 * size, hang=True)) as peers:
        with pytest.raises(RouterUnreachable):
            await _events(peers)


async def test_the_secret_goes_to_the_address_of_the_router_and_nowhere_else() -> None:
    asked: list[tuple[str, str, str | None, str | None]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        headers = request.headers
        asked.append((request.method, request.raw_path, headers.get("authorization"), headers.get("x-edgechat-tenant")))
        raise web.HTTPTemporaryRedirect("/other")

    async with peers_of(handler) as peers:
        with pytest.raises(RouterUnreachable):
            await peers.record("b", "Müller & Söhne\r\nx: y", "a/../b?c=d#e%2f")
        with pytest.raises(RouterUnreachable):
            await peers.record("c", "acme", ID)
    assert asked == [
        (
            "GET",
            "/internal/responses/a%2F..%2Fb%3Fc%3Dd%23e%252f/record",
            "Bearer secret",
            "M%C3%BCller%20%26%20S%C3%B6hne%0D%0Ax%3A%20y",
        )
    ]


async def test_a_router_behind_tls_is_told_the_secret_only_if_its_certificate_is_believed(http: ClientSession) -> None:
    behind_tls = msgspec.structs.replace(
        CONFIG, router=RouterSection("a"), listen=Listen(port=0, tls_cert=str(CERTIFICATE), tls_key=str(PRIVATE_KEY))
    )
    trusting = msgspec.structs.replace(CONFIG, router=RouterSection("b"), link=LinkSection(tls_ca=str(CERTIFICATE)))
    async with running_router(behind_tls) as a, running_router(trusting) as b, running_router() as suspicious:
        url = f"https://127.0.0.1:{a.port}"
        for other in (b, suspicious):
            other.context.routers.set_addresses([RouterAddress("a", url)])
            async with http.get(f"{other.url}/v1/responses/resp_a_0") as answer:
                code = (await answer.json())["error"]["code"]
            assert code == ("response_not_found" if other is b else "router_unreachable")


async def test_routers_of_different_secrets_are_strangers(
    pair: tuple[FakeRouter, FakeRouter], http: ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    a, _ = pair
    response_id, _ = await whole(a, http)
    stranger = Peers("another")
    stranger.set_addresses([RouterAddress("a", a.url)])
    with pytest.raises(RouterUnreachable):
        await stranger.record("a", "acme", response_id)
    assert "both routers need the same link secret" in caplog.text
    await stranger.close()


async def test_without_a_secret_or_after_its_end_a_router_asks_nobody() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        pytest.fail("nobody should ask")

    async with peers_of(handler, secret="") as peers:
        assert not peers.knows("b")
        with pytest.raises(RouterUnreachable):
            await peers.record("b", "acme", ID)
    async with peers_of(handler) as peers:
        await peers.close()
        with pytest.raises(RouterUnreachable):
            await peers.record("b", "acme", ID)


async def test_a_refusal_there_is_the_same_refusal_here() -> None:
    not_found = saying_only(404, '{"error": {"message": "no", "code": "response_not_found", "param": "x"}}', JSON)
    async with peers_of(not_found) as peers:
        assert await peers.record("b", "acme", ID) is None
        with pytest.raises(EdgechatError) as caught:
            await peers.cancel("b", "acme", ID)
        assert (caught.value.code, caught.value.status) == (ResponseNotFound.code, 404)
    full = saying_only(503, '{"error": {"message": "no", "code": "store_unavailable"}}', JSON)
    async with peers_of(full) as peers:
        with pytest.raises(EdgechatError) as caught:
            await peers.record("b", "acme", ID)
        assert (caught.value.code, caught.value.status) == ("store_unavailable", 503)


@given(st.lists(st.sampled_from([b'{"a":1}', b'"\\n"', b"0", b"{}"]), max_size=8), st.data())
def test_events_come_out_whole_wherever_the_stream_is_cut(said: list[bytes], chance: st.DataObject) -> None:
    stream = b"".join(COMMENT + b"event: x\ndata: " + one + b"\n\n" for one in said)
    cuts = sorted(chance.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    anywhere = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    everywhere = [stream[at : at + 1] for at in range(len(stream))]

    async def arriving(pieces: list[bytes]) -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def read(pieces: list[bytes]) -> list[bytes]:
        return [one async for one in sse_data(arriving(pieces))]

    assert asyncio.run(read(anywhere)) == asyncio.run(read(everywhere)) == said


# -- with patience -----------------------------------------------------------------------------

PATIENT = msgspec.structs.replace(CONFIG, session=SessionSection(resume_wait_s=60.0))


async def test_who_comes_back_after_a_routers_death_waits_until_another_may_go_on(http: ClientSession) -> None:
    clock = FakeClock()
    database = FakeDatabase(clock=lambda: clock.mono_s)
    async with routers("a", database=database) as (a,), routers("b", database=database, config=PATIENT) as (b,):
        for router in (a, b):
            router.store.beat_now(clock.mono_s)
        b.context.routers.set_addresses([RouterAddress("a", "http://127.0.0.1:1")])
        a.links.node("eu").come_up()
        async with asking(a, http) as (spoken, stream):
            spoken.say(2)
            first = await stream.take(6)
            # From here on `a` is as good as dead: it cannot be reached, and does not beat any more.
            b.links.node("us").come_up()
            claim, asked = b.store.claim, list[str]()

            async def counted(tenant: str, response_id: str) -> Unfinished | Owned | None:
                asked.append(response_id)
                return await claim(tenant, response_id)

            b.store.claim = counted  # type: ignore[method-assign]
            coming = asyncio.ensure_future(http.get(after(b, spoken.id, 5)))
            await until(lambda: len(asked) == 2)
            clock.mono_s += 60
            b.store.beat_now(clock.mono_s)
            node, frame = await b.links.generates.get()
            assert frame.output_ids == [100, 101]
            Spoken(node, frame, *TEXTS).finish()
            async with await coming as answer:
                assert answer.status == 200
                rest = await Stream(answer).rest()
            assert first + rest == await read_all(http, after(b, spoken.id))


async def test_a_resumed_stream_whose_way_breaks_goes_on_over_another_with_no_event_twice(
    http: ClientSession, anyone: ClientSession
) -> None:
    async with routers("a") as (a,), routers("b", config=PATIENT) as (b,):
        introduce({"a": a, "b": b})
        a.links.node("eu").come_up()
        async with (
            asking(a, http) as (spoken, _),
            anyone.ws_connect(f"{b.ws_url}/v1/responses", headers=with_key("alice")) as socket,
        ):
            clients = set(a.context.clients())
            await socket.send_json({"type": "edgechat:resume", "response_id": spoken.id})
            spoken.say(2)
            heard = [await socket.receive_json(timeout=10) for _ in range(6)]
            (way,) = set(a.context.clients()) - clients
            assert way.transport is not None
            way.transport.abort()
            spoken.finish()
            while not heard[-1]["type"].startswith("response.completed"):
                heard.append(await socket.receive_json(timeout=10))
            assert [event["sequence_number"] for event in heard] == list(range(EVENTS))
