"""Plain HTTP: SSE, refusals in OpenAI's shape, isolation of tenants, the page, what operators ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession
from openai.types.responses import Response, ResponseStreamEvent
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter
from yarl import URL

from router.http import pages
from router.http.stalls import HEAD_S
from tests.router.fakes import CONFIG, MODEL, FakeRouter, failing, running_router, saying

SDK_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
BODY = {"model": MODEL, "input": "hi"}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    async with running_router() as router:
        yield router


@pytest.fixture
async def http(router: FakeRouter) -> AsyncIterator[ClientSession]:
    async with ClientSession(router.url, headers=key("alice")) as session:
        yield session


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


@pytest.mark.parametrize(("path", "body"), [("/v1/responses", BODY), ("/v1/chat/completions", CHAT)])
@pytest.mark.parametrize("stream", [True, False])
async def test_what_a_node_refuses_is_an_http_status_also_for_streams(
    router: FakeRouter, http: ClientSession, path: str, body: dict[str, object], stream: bool
) -> None:
    router.links.node("eu", failing("context_length_exceeded", "9000 tokens, 2048 fit.")).come_up()
    async with http.post(path, json=body | {"stream": stream}) as answer:
        assert answer.status == 400
        error = (await answer.json())["error"]
    assert (error["code"], error["param"], error["message"]) == (
        "context_length_exceeded",
        "input",
        "9000 tokens, 2048 fit.",
    )


async def test_a_chat_stream_that_fails_midway_says_so_in_the_stream(router: FakeRouter, http: ClientSession) -> None:
    node = router.links.node("eu", lambda frame: saying("Hi", " there")(frame)[:2])
    node.come_up()
    async with http.post("/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
        await answer.content.readuntil(b"\n\n")
        node.go_down()
        blocks = parse_sse((await answer.read()).decode())
    assert json.loads(blocks[-1][1])["error"]["code"] == "node_lost"


async def test_an_id_of_ours_is_echoed_as_the_request_id(http: ClientSession) -> None:
    async with http.get("/v1/models", headers={"x-request-id": "mine-1"}) as answer:
        assert answer.headers["x-request-id"] == "mine-1"
    async with http.get("/v1/models", headers={"x-request-id": "no such; thing"}) as answer:
        assert answer.headers["x-request-id"].startswith("req_")


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/responses", "{", 400, "invalid_json"),
        ("POST", "/v1/responses", "[]", 400, "invalid_json"),
        ("POST", "/v1/responses", '{"model": "tiny"}', 400, "invalid_request"),
        ("POST", "/v1/responses", '{"model": "x", "input": "hi"}', 404, "model_not_found"),
        (
            "POST",
            "/v1/responses",
            '{"model":"tiny","input":"hi","previous_response_id":"resp_t_0"}',
            400,
            "previous_response_not_found",
        ),
        ("POST", "/v1/chat/completions", '{"model": "tiny", "messages": [], "n": 3}', 400, "invalid_request"),
        ("POST", "/v1/responses", f'{{"model":"tiny","input":"a","tool_choice":{2**64}}}', 400, "invalid_request"),
        (
            "POST",
            "/v1/responses",
            f'{{"model":"tiny","input":"a","max_output_tokens":{2**70}}}',
            400,
            "invalid_request",
        ),
        ("POST", "/v1/responses/compact", "{}", 501, "not_implemented"),
        ("GET", "/v1/realtime", None, 501, "not_implemented"),
        ("GET", "/v1/responses/resp_t_0?stream=true&starting_after=3", None, 501, "not_implemented"),
        ("GET", "/v1/responses", None, 426, "upgrade_required"),
        ("GET", "/ws", None, 426, "upgrade_required"),
        ("GET", "/v1/responses/resp_t_0", None, 404, "response_not_found"),
        ("DELETE", "/v1/responses/resp_t_0", None, 404, "response_not_found"),
        ("POST", "/v1/responses/resp_t_0/cancel", None, 404, "response_not_found"),
        ("GET", "/v1/nonsense", None, 404, "not_found"),
        ("PUT", "/v1/responses", None, 405, "method_not_allowed"),
    ],
)
async def test_a_refusal_has_openais_shape_and_no_traceback(
    router: FakeRouter, http: ClientSession, method: str, path: str, body: str | None, status: int, code: str
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    async with http.request(method, path, data=body) as answer:
        assert answer.status == status
        assert answer.headers["content-type"] == "application/json"
        error = (await answer.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "Traceback" not in error["message"]


async def test_a_body_over_the_limit_is_a_413(http: ClientSession) -> None:
    async with http.post("/v1/responses", data=b" " * (CONFIG.limits.max_frame_bytes + 1)) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (413, "request_too_large")


async def test_without_a_node_it_is_a_503_with_retry_after(http: ClientSession) -> None:
    async with http.post("/v1/responses", json=BODY) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "no_node_available")
        assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
async def test_a_node_lost_mid_answer_is_a_502_for_who_waits_for_one_json(
    router: FakeRouter, http: ClientSession, path: str
) -> None:
    node = router.links.node("eu", failing("engine_lost", "The engine died.", retryable=True))
    node.come_up()
    async with http.post(path, json=BODY | CHAT) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (502, "node_lost")


async def test_a_mistake_of_ours_is_a_500_that_names_the_request(
    router: FakeRouter, http: ClientSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*arguments: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(router.store, "get", broken)
    async with http.get("/v1/responses/resp_t_1") as answer:
        assert answer.status == 500
        text = await answer.text()
        assert answer.headers["x-request-id"] in text
    assert "secret detail" not in text
    assert "secret detail" in caplog.text


@pytest.mark.parametrize("name", ["", "wrong", "alice2"])
async def test_a_wrong_key_is_a_401(router: FakeRouter, name: str) -> None:
    async with ClientSession(router.url) as http, http.post("/v1/responses", json=BODY, headers=key(name)) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (401, "invalid_api_key")


async def test_a_key_without_the_role_is_a_403(router: FakeRouter, http: ClientSession) -> None:
    async with http.get("/fleet") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (403, "forbidden")
    async with http.post("/v1/responses", json=BODY, headers=key("ops")) as answer:
        assert answer.status == 403


@pytest.mark.parametrize("path", ["/v1/models", "/", "/livez"])
async def test_a_page_of_another_site_is_refused_whatever_it_asks(http: ClientSession, path: str) -> None:
    async with http.get(path, headers={"Origin": "https://evil.example"}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (403, "origin_not_allowed")


async def test_a_page_under_a_name_pointed_at_this_machine_cannot_read_the_fleet(router: FakeRouter) -> None:
    headers = key("dev") | {"Host": f"evil.example:{router.port}"}
    async with ClientSession(router.url, headers=headers) as http, http.get("/fleet") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (403, "host_not_allowed")


async def test_a_key_that_is_no_text_is_a_401(router: FakeRouter) -> None:
    answer = await _exchange(
        router, b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer \xff\r\n\r\n"
    )
    assert b" 401 " in answer.split(b"\r\n")[0]


async def test_a_body_that_is_not_what_it_says_is_a_400(http: ClientSession) -> None:
    async with http.post("/v1/responses", data=b"{}", headers={"Content-Encoding": "gzip"}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (400, "invalid_request")


async def test_the_log_holds_no_bytes_of_a_request_that_cannot_be_read(
    router: FakeRouter, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer sesame\x01\r\n\r\n"
    assert b" 400 " in await _exchange(router, head)
    assert "BadHttpMessage" in caplog.text
    assert "sesame" not in caplog.text


async def _exchange(router: FakeRouter, request: bytes) -> bytes:
    """What comes back, at least its head, for bytes that no client library would send."""
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    writer.write(request)
    answer = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    return answer


async def test_beyond_the_connection_limit_requests_are_refused_but_probes_answered() -> None:
    limits = msgspec.structs.replace(CONFIG.limits, max_connections=1)
    async with (
        running_router(msgspec.structs.replace(CONFIG, limits=limits)) as router,
        ClientSession() as http,
        http.ws_connect(f"{router.ws_url}/v1/responses", headers=key("alice")),
    ):
        async with http.get(f"{router.url}/v1/models", headers=key("alice")) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "overloaded")
        async with http.get(f"{router.url}/livez") as answer:
            assert answer.status == 200


# -- responses that are kept -----------------------------------------------------------------------


async def test_another_tenants_response_answers_exactly_as_an_unknown_one(
    router: FakeRouter, http: ClientSession
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    made = await (await http.post("/v1/responses", json=BODY)).json()
    unknown = made["id"][:-4] + "0000"

    async def ask(method: str, path: str, response_id: str, body: object = None) -> tuple[int, str]:
        async with http.request(method, path.format(response_id), json=body, headers=key("bob")) as answer:
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
        async with http.request(method, f"/v1/responses/{frame.stream}{path}", headers=key("bob")) as answer:
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
    router.store.full = True
    async with http.get("/v1/responses/resp_t_1") as answer:
        text = await answer.text()
        assert (answer.status, "store_unavailable" in text, "sqlite" in text) == (503, True, False)
    async with http.post("/v1/responses", json=BODY | {"previous_response_id": "resp_t_1"}) as answer:
        assert answer.status == 503
    async with http.post("/v1/responses", json=BODY) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "store_unavailable")
    assert "router.sqlite is full" in caplog.text


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
        (await http.post("/v1/responses", json=BODY | extra, headers=key(name))).close()
        frames.append((await router.links.generates.get())[1])
    assert frames[0].seed == 42
    assert frames[1].seed != frames[2].seed
    assert frames[0].cache_salt == frames[2].cache_salt != frames[3].cache_salt
    assert all(frame.stream.startswith("resp_t_") for frame in frames)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_cancels_its_unstored_answer(router: FakeRouter, path: str, stream: bool) -> None:
    router.links.node("eu").come_up()
    async with ClientSession(router.url, headers=key("alice")) as http:
        asking = asyncio.create_task(http.post(path, json=BODY | CHAT | {"store": False, "stream": stream}))
        _, frame = await router.links.generates.get()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    _, cancel = await asyncio.wait_for(router.links.cancels.get(), 10)
    assert cancel.stream == frame.stream


# -- the page, and what operators ask ---------------------------------------------------------------


@pytest.fixture
def web_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "index.html").write_text("<!doctype html><title>chat</title>")
    (folder / "chat.js").write_text("export {};")
    (folder / "notes.py").write_text("secret = 1")
    (tmp_path / "outside.js").write_text("secret")
    monkeypatch.setattr(pages, "WEB_FOLDER", folder)
    return folder


@pytest.mark.usefixtures("web_folder")
async def test_the_page_is_served_without_a_key_and_may_do_nothing_but_talk_to_us(router: FakeRouter) -> None:
    async with ClientSession(router.url) as http, http.get("/") as answer:
        assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    async with ClientSession(router.url) as http, http.get("/web/chat.js") as answer:
        assert (answer.status, answer.headers["content-type"]) == (200, "text/javascript; charset=utf-8")


@pytest.mark.usefixtures("web_folder")
@pytest.mark.parametrize(
    "path",
    [
        *("../outside.js", "%2e%2e/outside.js", "..%2foutside.js", "%2fetc%2fpasswd", "notes.py", "none.js", "a%00.js"),
        "a" * 300 + ".js",
    ],
)
async def test_only_files_of_the_page_are_served(router: FakeRouter, path: str) -> None:
    async with ClientSession() as http, http.get(URL(f"{router.url}/web/{path}", encoded=True)) as answer:
        assert answer.status == 404
        assert "secret" not in await answer.text()


async def test_ready_means_that_a_node_can_be_given_work(router: FakeRouter) -> None:
    async with ClientSession(router.url) as http:
        assert (await http.get("/livez")).status == 200
        assert (await http.get("/readyz")).status == 503
        router.links.node("eu").come_up()
        assert (await http.get("/readyz")).status == 200


async def test_the_fleet_shows_every_node_to_operators(router: FakeRouter, http: ClientSession) -> None:
    router.links.node("eu").come_up(0.002)
    router.links.node("us").come_up()
    router.links.nodes["ws://us:1/link"].go_down()
    async with http.get("/fleet", headers=key("ops")) as answer:
        eu, us = (await answer.json())["nodes"]
    assert (eu["name"], eu["region"], eu["release"]) == ("eu", "region-eu", "tiny@0123456789ab")
    assert (eu["variant"], eu["pid"], eu["engine_pid"], eu["state"]) == ("cpu-int8", 4242, 77, "ready")
    assert (eu["running"], eu["waiting"], eu["slots"], eu["rtt_ms"]) == (0, 0, 2, 2.0)
    assert us["state"] == "down"


async def test_the_edges_are_shown_to_any_key(router: FakeRouter, http: ClientSession) -> None:
    router.links.node("eu").come_up(0.002)
    for name in ("alice", "ops"):
        async with http.get("/v1/edges", headers=key(name)) as answer:
            (edge,) = (await answer.json())["data"]
        assert edge == {"name": "eu", "region": "region-eu", "models": [MODEL], "available": True, "rtt_ms": 2.0}


async def test_metrics_count_what_happened_and_hold_no_text(router: FakeRouter, http: ClientSession) -> None:
    router.links.node("eu", saying("Sesame")).come_up()
    (await http.post("/v1/responses", json=BODY | {"input": "Mellon"})).close()
    (await http.post("/v1/responses", json={})).close()
    async with http.get("/metrics", headers=key("ops")) as answer:
        text = await answer.text()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["edgechat_router_first_token_seconds"].type == "histogram"
    assert 'edgechat_router_responses_total{status="completed"} 1.0' in text
    assert 'edgechat_router_refusals_total{code="invalid_request"} 1.0' in text
    assert 'edgechat_router_nodes{state="ready"} 1.0' in text
    assert "Sesame" not in text
    assert "Mellon" not in text


async def test_a_history_that_no_model_could_read_is_refused_before_it_fills_the_memory(
    router: FakeRouter, http: ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.dispatch.MAX_HISTORY_CHARACTERS", 100)
    router.links.node("eu", saying("Hi")).come_up()
    async with http.post("/v1/responses", json=BODY | {"input": "x" * 60}) as answer:
        first = (await answer.json())["id"]
    async with http.post("/v1/responses", json=BODY | {"input": "x" * 60, "previous_response_id": first}) as answer:
        second = (await answer.json())["id"]
    async with http.post("/v1/responses", json=BODY | {"previous_response_id": second}) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["param"]) == (400, "previous_response_id")


# -- clients that keep us waiting ----------------------------------------------------------------


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
