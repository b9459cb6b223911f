"""Responses that are kept: retrieved, continued, cancelled, forgotten, and nobody else's."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import ClientSession
from openai.types.responses import Response

from tests.router.fakes import BODY, CHAT, FakeRouter, saying, with_key


async def test_another_tenants_response_answers_exactly_as_an_unknown_one(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    made = await (await http.post("/v1/responses", json=BODY)).json()
    unknown = made["id"][:-4] + "0000"

    async def ask(method: str, path: str, response_id: str, body: object = None) -> tuple[int, str]:
        async with http.request(method, path.format(response_id), json=body, headers=with_key("bob")) as answer:
            return answer.status, (await answer.text()).replace(response_id, "ID")

    for method, path in [
        ("GET", "/v1/responses/{}"),
        ("DELETE", "/v1/responses/{}"),
        ("POST", "/v1/responses/{}/cancel"),
    ]:
        assert await ask(method, path, made["id"]) == await ask(method, path, unknown)
    for response_id in (made["id"], unknown):
        status, text = await ask("POST", "/v1/responses", response_id, BODY | {"previous_response_id": response_id})
        assert status == 400
        assert "previous_response_not_found" in text
    async with http.get(f"/v1/responses/{made['id']}") as answer:
        assert await answer.json() == made


async def test_another_tenants_running_response_cannot_be_seen_or_stopped(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu").come_up()
    waiting = asyncio.create_task(http.post("/v1/responses", json=BODY))
    _, frame = await router.links.generates.get()
    for method, path in [("GET", ""), ("DELETE", ""), ("POST", "/cancel")]:
        async with http.request(method, f"/v1/responses/{frame.stream}{path}", headers=with_key("bob")) as answer:
            assert answer.status == 404
    assert router.links.cancels.empty()
    async with http.post(f"/v1/responses/{frame.stream}/cancel") as answer:
        assert (await answer.json())["status"] == "cancelled"
    async with await waiting as answer:
        assert (await answer.json())["status"] == "cancelled"


async def test_a_running_response_can_be_looked_at_and_deleting_it_stops_it_for_good(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu").come_up()
    waiting = asyncio.create_task(http.post("/v1/responses", json=BODY))
    _, frame = await router.links.generates.get()
    async with http.get(f"/v1/responses/{frame.stream}") as answer:
        assert (await answer.json())["status"] == "in_progress"
    async with http.delete(f"/v1/responses/{frame.stream}") as answer:
        assert await answer.json() == {"id": frame.stream, "object": "response", "deleted": True}
    (await waiting).close()
    assert router.store.kept == {}
    async with http.get(f"/v1/responses/{frame.stream}") as answer:
        assert answer.status == 404


async def test_a_store_that_cannot_be_read_is_a_503_that_names_no_file(
    router: FakeRouter, http: ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    router.store.down = True
    async with http.get("/v1/responses/resp_t_1") as answer:
        text = await answer.text()
        assert (answer.status, "store_unavailable" in text, "memory" in text) == (503, True, False)
    async with http.post("/v1/responses", json=BODY | {"previous_response_id": "resp_t_1"}) as answer:
        assert answer.status == 503
    async with http.post("/v1/responses", json=BODY) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "store_unavailable")
    assert "The store in memory is down" in caplog.text


async def test_cancelling_a_finished_response_answers_with_it_unchanged(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    async with http.post("/v1/responses", json=BODY) as answer:
        assert answer.headers["x-edge-node"] == "eu"
        made = await answer.json()
    Response.model_validate(made)
    async with http.post(f"/v1/responses/{made['id']}/cancel") as answer:
        assert await answer.json() == made


async def test_a_conversation_whose_beginning_is_gone_is_named_as_its_client_knows_it(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu", saying("Yes")).come_up()
    ids: list[str] = []
    for _ in range(2):
        async with http.post("/v1/responses", json=BODY | {"previous_response_id": ids[-1] if ids else None}) as answer:
            ids.append((await answer.json())["id"])
    async with http.delete(f"/v1/responses/{ids[0]}"):
        pass
    async with http.post("/v1/responses", json=BODY | {"previous_response_id": ids[1]}) as answer:
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (400, "previous_response_not_found")
        assert ids[1] in error["message"] and ids[0] not in error["message"]


async def test_history_is_walked_to_its_beginning_and_instructions_are_not_inherited(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu", saying("Yes", ".")).come_up()
    previous = None
    for turn in range(3):
        body = BODY | {"input": f"turn {turn}", "instructions": f"rule {turn}", "previous_response_id": previous}
        async with http.post("/v1/responses", json=body) as answer:
            previous = (await answer.json())["id"]
        _, frame = await router.links.generates.get()
    assert [item.text for item in frame.items] == ["rule 2", "turn 0", "Yes.", "turn 1", "Yes.", "turn 2"]
    assert frame.items[0].role == "system"


async def test_a_seed_is_passed_on_and_otherwise_drawn_anew_and_salts_differ_by_tenant(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    frames = []
    for name, extra in [("alice", {"seed": 42}), ("alice", {}), ("alice", {}), ("bob", {})]:
        (await http.post("/v1/responses", json=BODY | extra, headers=with_key(name))).close()
        frames.append((await router.links.generates.get())[1])
    assert frames[0].seed == 42
    assert frames[1].seed != frames[2].seed
    assert frames[0].cache_salt == frames[2].cache_salt != frames[3].cache_salt
    assert all(frame.stream.startswith("resp_t_") for frame in frames)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_cancels_its_unstored_answer(router: FakeRouter, path: str, stream: bool) -> None:
    router.links.node("eu").come_up()
    async with ClientSession(router.url, headers=with_key("alice")) as http:
        asking = asyncio.create_task(http.post(path, json=BODY | CHAT | {"store": False, "stream": stream}))
        _, frame = await router.links.generates.get()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    _, cancel = await asyncio.wait_for(router.links.cancels.get(), 10)
    assert cancel.stream == frame.stream
