"""What another router may ask, and that nobody else can."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession

from router.journal import StoredResponse
from router.server import listening, make_context
from tests.fake_store import FakeDatabase, FakeStore
from tests.router.fakes import CONFIG, FakeLinks, FakeRouter, with_key
from tests.router.reading import Stream, after, asking, client, routers, until, whole

AS_ROUTER = {"Authorization": "Bearer secret", "x-edgechat-tenant": "acme"}
ASKED = [("GET", ""), ("GET", "?stream=true"), ("GET", "/record"), ("DELETE", ""), ("POST", "/cancel")]


@pytest.fixture
async def http() -> AsyncIterator[ClientSession]:
    async with client() as session:
        yield session


async def ask(
    router: FakeRouter, method: str, path: str, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    async with ClientSession() as anybody:
        url = f"{router.url}/internal/responses/{path}"
        async with anybody.request(method, url, headers=AS_ROUTER if headers is None else headers) as answer:
            return answer.status, await answer.json()


@pytest.mark.parametrize(("method", "action"), ASKED)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer secret2"},
        {"Authorization": "Basic secret"},
        {"Authorization": "Bearer alice"},
        {"Authorization": "Bearer dev"},
        {"Authorization": "Bearer ops"},
        {"Sec-WebSocket-Protocol": "openai-insecure-api-key.secret"},
    ],
)
async def test_without_the_link_secret_these_paths_do_not_exist(
    router: FakeRouter, http: ClientSession, method: str, action: str, headers: dict[str, str]
) -> None:
    router.links.node("eu").come_up()
    response_id, _ = await whole(router, http)
    headers = headers | {"x-edgechat-tenant": "acme"}
    status, body = await ask(router, method, response_id + action, headers)
    assert (status, body["error"]["code"]) == (404, "not_found")
    assert (await ask(router, method, "resp_t_0" + action, headers))[0] == 404
    assert len(router.store.kept) == 1


@pytest.mark.parametrize("key", ["", "secret", "dev"])
async def test_a_router_without_a_link_secret_has_no_internal_paths(key: str) -> None:
    store = FakeStore(FakeDatabase(), "t")
    context = make_context(CONFIG, "", FakeLinks(), store)
    async with listening(context) as port, ClientSession() as anybody:
        headers = {"Authorization": f"Bearer {key}", "x-edgechat-tenant": "acme"}
        async with anybody.get(f"http://127.0.0.1:{port}/internal/responses/resp_t_0", headers=headers) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(("method", "action"), ASKED)
async def test_a_router_speaks_for_one_tenant_at_a_time(
    router: FakeRouter, http: ClientSession, method: str, action: str
) -> None:
    router.links.node("eu").come_up()
    response_id, _ = await whole(router, http)
    strange = AS_ROUTER | {"x-edgechat-tenant": "other"}
    status, body = await ask(router, method, response_id + action, strange)
    assert (status, body["error"]["code"]) == (404, "response_not_found")
    for missing in ({"Authorization": "Bearer secret"}, AS_ROUTER | {"x-edgechat-tenant": ""}):
        status, body = await ask(router, method, response_id + action, missing)
        assert status == 400
        assert "x-edgechat-tenant" in body["error"]["message"]
    assert len(router.store.kept) == 1


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_tenant_that_a_client_claims_for_itself_counts_for_nothing(
    router: FakeRouter, http: ClientSession, method: str
) -> None:
    router.links.node("eu").come_up()
    response_id, _ = await whole(router, http)
    forged = with_key("bob") | {"x-edgechat-tenant": "acme"}
    async with (
        ClientSession() as bob,
        bob.request(method, f"{router.url}/v1/responses/{response_id}", headers=forged) as answer,
    ):
        assert answer.status == 404


async def test_a_record_has_the_ids_and_only_what_has_ended_has_one(router: FakeRouter, http: ClientSession) -> None:
    router.links.node("eu").come_up()
    async with asking(router, http) as (spoken, stream):
        spoken.say()
        assert (await ask(router, "GET", spoken.id + "/record"))[0] == 404
        spoken.finish()
        await stream.rest()
    url = f"{router.url}/internal/responses/{spoken.id}/record"
    async with ClientSession() as other, other.get(url, headers=AS_ROUTER) as answer:
        assert answer.content_type == "application/msgpack"
        stored = msgspec.msgpack.decode(await answer.read(), type=StoredResponse)
    assert stored == router.store.kept["acme", spoken.id]
    assert stored.ids == [100, 101, 102, 103, 104]


async def test_a_stream_says_that_it_lives_while_it_has_nothing_to_say(
    router: FakeRouter, http: ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.http.internal.HEARTBEAT_S", 0.01)
    router.links.node("eu").come_up()
    async with asking(router, http) as (spoken, first), ClientSession() as other:
        url = f"{router.url}/internal/responses/{spoken.id}?stream=true&starting_after=1"
        async with other.get(url, headers=AS_ROUTER) as answer:
            assert await answer.content.readexactly(8) == b": \n\n" * 2
            spoken.finish()
            assert await Stream(answer).rest() == (await first.rest())[2:]
    await until(lambda: len(router.context.sessions) == 0)


async def test_a_question_is_not_passed_on_to_a_third_router(http: ClientSession) -> None:
    async with routers("a", "b") as (a, b):
        for method, action in ASKED:
            status, body = await ask(b, method, "resp_a_0" + action)
            assert (status, body["error"]["code"]) == (404, "response_not_found")
            async with http.request(method, f"{b.url}/v1/responses/resp_a_0{action}") as answer:
                assert answer.status == 404
        # Each believes that the other has it.
        async with http.get(after(a, "resp_b_0")) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "response_not_found")


async def test_a_router_that_stops_takes_no_questions(router: FakeRouter) -> None:
    router.context.dispatcher.draining = True
    status, body = await ask(router, "GET", "resp_t_0")
    assert (status, body["error"]["code"]) == (503, "draining")


async def test_a_page_cannot_ask_even_if_it_knew_the_secret(router: FakeRouter) -> None:
    assert (await ask(router, "GET", "resp_t_0", AS_ROUTER | {"Origin": "https://evil.example"}))[0] == 403
    assert (await ask(router, "GET", "resp_t_0", AS_ROUTER | {"Host": "evil.example"}))[0] == 403
