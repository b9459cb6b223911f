"""What is refused over HTTP: in OpenAI's shape, with an honest status, and no traceback."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import pytest
from aiohttp import ClientSession

from tests.router.fakes import BODY, CHAT, CONFIG, FakeRouter, failing, running_router, saying, with_key


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
        ("GET", "/v1/responses/resp_t_0?stream=true&starting_after=3", None, 404, "response_not_found"),
        ("GET", "/v1/responses/resp_t_0?stream=1", None, 400, "invalid_request"),
        ("GET", "/v1/responses/resp_t_0?stream=true&starting_after=-1", None, 400, "invalid_request"),
        ("GET", "/internal/responses/resp_t_0", None, 404, "not_found"),
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


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [("/v1/responses", BODY, "text.format"), ("/v1/chat/completions", CHAT, "response_format")],
)
async def test_a_nodes_refusal_names_the_field_as_its_client_has_written_it(
    router: FakeRouter, http: ClientSession, path: str, body: dict[str, object], param: str, stream: bool
) -> None:
    refusing = failing("unsupported_parameter", "`text.format` cannot be held.", param="text.format")
    router.links.node("eu", refusing).come_up()
    async with http.post(path, json=body | {"stream": stream}) as answer:
        assert answer.status == 400
        error = (await answer.json())["error"]
    assert (error["param"], error["message"]) == (param, f"`{param}` cannot be held.")


async def test_a_request_nested_to_the_interpreters_limit_is_never_a_mistake_of_ours(
    router: FakeRouter, http: ClientSession
) -> None:
    node = router.links.node("eu", saying("Hi"))
    node.come_up()
    statuses = []
    for depth in range(960, 1000):
        parameters = '{"a":' * depth + "1" + "}" * depth
        tool = f'{{"type":"function","name":"f","parameters":{parameters}}}'
        async with http.post("/v1/responses", data=f'{{"model":"tiny","input":"x","tools":[{tool}]}}') as answer:
            statuses.append(answer.status)
        node.status()
    assert set(statuses) <= {200, 400}
    assert statuses[-1] == 400


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
    async with (
        ClientSession(router.url) as http,
        http.post("/v1/responses", json=BODY, headers=with_key(name)) as answer,
    ):
        assert (answer.status, (await answer.json())["error"]["code"]) == (401, "invalid_api_key")


async def test_a_key_without_the_role_is_a_403(router: FakeRouter, http: ClientSession) -> None:
    async with http.get("/fleet") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (403, "forbidden")
    async with http.post("/v1/responses", json=BODY, headers=with_key("ops")) as answer:
        assert answer.status == 403


@pytest.mark.parametrize("path", ["/v1/models", "/", "/livez"])
async def test_a_page_of_another_site_is_refused_whatever_it_asks(http: ClientSession, path: str) -> None:
    async with http.get(path, headers={"Origin": "https://evil.example"}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (403, "origin_not_allowed")


async def test_a_page_under_a_name_pointed_at_this_machine_cannot_read_the_fleet(router: FakeRouter) -> None:
    headers = with_key("dev") | {"Host": f"evil.example:{router.port}"}
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
        http.ws_connect(f"{router.ws_url}/v1/responses", headers=with_key("alice")),
    ):
        async with http.get(f"{router.url}/v1/models", headers=with_key("alice")) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "overloaded")
        async with http.get(f"{router.url}/livez") as answer:
            assert answer.status == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_no_node_had_accepted_when_the_router_stops_may_be_sent_again(stream: bool) -> None:
    async with contextlib.AsyncExitStack() as stopping:
        router = await stopping.enter_async_context(running_router())
        router.links.node("eu", lambda frame: []).come_up()
        async with ClientSession(router.url, headers=with_key("alice")) as http:
            asking = asyncio.create_task(http.post("/v1/responses", json=BODY | {"stream": stream}))
            await router.links.generates.get()
            await stopping.aclose()
            async with await asking as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (503, "draining")
                assert int(answer.headers["retry-after"]) >= 1
    assert router.store.kept == {}
