"""The WebSocket mode, frame by frame, with a bare client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType, WSServerHandshakeError
from openai.types.responses.responses_server_event import ResponsesServerEvent
from pydantic import TypeAdapter
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from core.frames import Drain, Failed, Progress
from router.http.kept import Kept
from tests.router.fakes import CONFIG, MODEL, FakeRouter, done, failing, running_router, saying, tokens, words

TERMINAL = {"response.completed", "response.incomplete", "response.failed", "error"}
SDK_EVENT: TypeAdapter[Any] = TypeAdapter(ResponsesServerEvent)
KEY = {"Authorization": "Bearer alice"}


async def create(socket: ClientWebSocketResponse, **fields: Any) -> None:
    await socket.send_json({"type": "response.create", "model": MODEL, "input": "hi"} | fields)


async def until_end(socket: ClientWebSocketResponse) -> list[dict[str, Any]]:
    """Events up to a terminal one."""
    events: list[dict[str, Any]] = []
    while not events or events[-1]["type"] not in TERMINAL:
        events.append(await socket.receive_json(timeout=10))
    return events


async def test_every_frame_is_valid_under_the_sdks_own_models(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    router.links.node("eu", saying("Hi", " there")).come_up()
    await create(socket, metadata={"a": "b"}, tools=[{"type": "function", "name": "f", "parameters": {}}])
    events = await until_end(socket)
    for event in events:
        SDK_EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert isinstance(events[0]["response"]["created_at"], int)
    assert set(events[0]["response"]) == set(events[-1]["response"])
    assert "stream_id" not in events[0]


async def test_the_handshake_names_the_connection_and_never_echoes_the_key(
    router: FakeRouter, anyone: ClientSession
) -> None:
    offered = ("openai-insecure-api-key.alice", "unheard.of", "responses.v1.json")
    async with anyone.ws_connect(f"{router.ws_url}/v1/responses", protocols=offered) as socket:
        assert socket.protocol == "responses.v1.json"
        head = socket._response.headers
        assert head["x-connection-id"].startswith("conn_")
        assert "alice" not in str(head)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic alice"}])
@pytest.mark.parametrize("path", ["/v1/responses", "/ws"])
async def test_a_wrong_key_is_a_401_at_the_handshake(
    router: FakeRouter, anyone: ClientSession, headers: dict[str, str], path: str
) -> None:
    with pytest.raises(WSServerHandshakeError) as caught:
        await anyone.ws_connect(router.ws_url + path, headers=headers)
    assert caught.value.status == 401


@pytest.mark.parametrize("path", ["/v1/responses", "/ws"])
async def test_a_key_that_may_not_chat_is_a_403_at_the_handshake(
    router: FakeRouter, anyone: ClientSession, path: str
) -> None:
    with pytest.raises(WSServerHandshakeError) as caught:
        await anyone.ws_connect(router.ws_url + path, headers={"Authorization": "Bearer ops"})
    assert caught.value.status == 403


async def test_a_client_that_does_not_answer_a_ping_is_given_up(
    anyone: ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.http.websocket.HEARTBEAT_S", 0.05)
    async with (
        running_router() as router,
        anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=KEY, autoping=False) as deaf,
    ):
        assert (await deaf.receive(timeout=10)).type is WSMsgType.PING
        while (await deaf.receive(timeout=10)).type is WSMsgType.PING:
            pass
        await _until(lambda: not router.context.peers)


async def test_a_page_of_another_site_is_refused_at_the_handshake(router: FakeRouter, anyone: ClientSession) -> None:
    with pytest.raises(WSServerHandshakeError) as caught:
        await anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=KEY | {"Origin": "https://evil.example"})
    assert caught.value.status == 403


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        ("{", "invalid_json", None),
        ("[]", "invalid_json", None),
        ('{"type": "session.update"}', "invalid_request", "type"),
        ('{"type": "response.create", "model": "tiny"}', "invalid_request", "input"),
        ('{"type": "response.create", "model": "tiny", "input": "x", "seed": 1e400}', "invalid_json", None),
        (
            json.dumps({"type": "response.create", "model": "tiny", "input": "x", "stream_id": "s" * 129}),
            "invalid_request",
            "stream_id",
        ),
        ('{"type": "response.cancel", "response_id": "resp_t_0"}', "response_not_found", "response_id"),
    ],
)
async def test_nonsense_is_answered_by_an_error_event_and_the_connection_stays(
    router: FakeRouter, socket: ClientWebSocketResponse, text: str, code: str, param: str | None
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    await socket.send_str(text)
    event = await socket.receive_json(timeout=10)
    assert (event["type"], event["code"], event["error"]["code"], event["param"]) == ("error", code, code, param)
    SDK_EVENT.validate_python(event)
    await create(socket)
    assert (await until_end(socket))[-1]["type"] == "response.completed"


async def test_a_binary_frame_is_refused_and_the_connection_stays(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    await socket.send_bytes(b"\x81\xa4type")
    assert (await socket.receive_json(timeout=10))["error"]["type"] == "invalid_request_error"
    await create(socket)
    assert (await until_end(socket))[-1]["type"] == "response.completed"


async def test_an_oversized_frame_closes_with_1009(anyone: ClientSession) -> None:
    limits = msgspec.structs.replace(CONFIG.limits, max_frame_bytes=1000)
    async with (
        running_router(msgspec.structs.replace(CONFIG, limits=limits)) as router,
        anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=KEY) as socket,
    ):
        await socket.send_str("x" * 2000)
        assert (await socket.receive(timeout=10)).type is WSMsgType.CLOSE
        assert socket.close_code == 1009


async def test_an_unknown_model_lists_the_known_ones(router: FakeRouter, socket: ClientWebSocketResponse) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    await create(socket, model="gpt-9")
    event = await socket.receive_json(timeout=10)
    assert (event["status"], event["code"]) == (404, "model_not_found")
    assert MODEL in event["message"]


async def test_without_a_node_the_client_is_told_when_to_try_again(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    await create(socket)
    event = await socket.receive_json(timeout=10)
    assert (event["status"], event["code"]) == (503, "no_node_available")
    assert event["retry_after_ms"] > 0


async def test_creates_queue_on_a_connection_and_are_answered_in_order(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    for number in range(3):
        await create(socket, metadata={"n": str(number)})
    ends = [(await until_end(socket))[-1]["response"]["metadata"]["n"] for _ in range(3)]
    assert ends == ["0", "1", "2"]


async def test_too_many_queued_creates_are_refused_and_lose_nothing(anyone: ClientSession) -> None:
    limits = msgspec.structs.replace(CONFIG.limits, max_queued_per_connection=1)
    async with running_router(msgspec.structs.replace(CONFIG, limits=limits)) as router:
        node = router.links.node("eu")
        node.come_up()
        async with anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=KEY) as socket:
            await create(socket)
            _, first = await router.links.generates.get()
            await create(socket)
            await create(socket)
            refusal = (await until_end(socket))[-1]
            assert (refusal["type"], refusal["status"], refusal["code"]) == ("error", 503, "overloaded")
            node.say(done(first, 0))
            assert (await until_end(socket))[-1]["type"] == "response.completed"
            _, second = await router.links.generates.get()
            node.say(done(second, 0))
            assert (await until_end(socket))[-1]["type"] == "response.completed"


async def test_lanes_run_side_by_side_and_every_event_names_its_lane(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    node = router.links.node("eu")
    node.come_up()
    await create(socket, stream_id="a")
    await create(socket, stream_id="b")
    _, first = await router.links.generates.get()
    _, second = await router.links.generates.get()
    node.say(done(second, 0))
    events = await until_end(socket)
    assert events[-1]["stream_id"] == "b"
    node.say(done(first, 0))
    events += await until_end(socket)
    assert events[-1]["stream_id"] == "a"
    for lane in "ab":
        numbers = [event["sequence_number"] for event in events if event["stream_id"] == lane]
        assert numbers == list(range(len(numbers)))


async def test_the_deadline_of_a_request_that_waits_for_its_lane_counts_from_its_arrival(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    node = router.links.node("eu")
    node.come_up()
    await create(socket)
    _, first = await router.links.generates.get()
    for deadline_s in (9.0, 20.0):
        await create(socket, **{"edgechat:deadline_s": deadline_s})
    # An answer on another lane shows that those before it were read.
    await socket.send_json({"type": "response.cancel", "response_id": "resp_none", "stream_id": "b"})
    while (await socket.receive_json(timeout=10)).get("code") != "response_not_found":
        pass
    router.clock.mono_s += 9.0
    node.status()
    node.say(done(first, 0))
    assert (await until_end(socket))[-1]["response"]["id"] == first.stream
    assert (await until_end(socket))[-1]["code"] == "deadline_exceeded"
    _, frame = await router.links.generates.get()
    assert frame.deadline_s == 11.0


async def test_a_lane_can_continue_a_response_of_another_lane(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    await create(socket, stream_id="a", store=False)
    first = (await until_end(socket))[-1]["response"]["id"]
    await create(socket, stream_id="b", store=False, previous_response_id=first)
    assert (await until_end(socket))[-1]["response"]["previous_response_id"] == first


async def test_an_unstored_response_is_remembered_by_its_own_connection_only(
    router: FakeRouter, anyone: ClientSession, socket: ClientWebSocketResponse
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    await create(socket, store=False)
    first = (await until_end(socket))[-1]["response"]["id"]
    async with anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=KEY) as other:
        await create(other, previous_response_id=first)
        event = await other.receive_json(timeout=10)
    assert (event["status"], event["code"], event["param"]) == (
        400,
        "previous_response_not_found",
        "previous_response_id",
    )
    assert router.store.kept == {}


async def test_a_connection_remembers_its_newest_unstored_responses_only(
    router: FakeRouter, anyone: ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.http.responses_ws.Kept", lambda: Kept(most=1))
    router.links.node("eu", saying("Hi")).come_up()
    async with anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=KEY) as socket:
        made = []
        for _ in range(2):
            await create(socket, store=False)
            made.append((await until_end(socket))[-1]["response"]["id"])
        await create(socket, previous_response_id=made[0])
        assert (await until_end(socket))[-1]["code"] == "previous_response_not_found"
        await create(socket, previous_response_id=made[1])
        assert (await until_end(socket))[-1]["type"] == "response.completed"


async def test_a_warm_up_says_nothing_and_can_be_continued(router: FakeRouter, socket: ClientWebSocketResponse) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    await create(socket, generate=False, input="You are Ada.", store=False)
    events = await until_end(socket)
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.completed"]
    assert events[-1]["response"]["output"] == []
    assert router.links.generates.empty()
    await create(socket, previous_response_id=events[-1]["response"]["id"])
    await until_end(socket)
    _, frame = await router.links.generates.get()
    assert [item.text for item in frame.items] == ["You are Ada.", "hi"]


async def test_a_cancel_ends_the_response_and_stops_the_node(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    node = router.links.node("eu")
    node.come_up()
    await create(socket)
    _, frame = await router.links.generates.get()
    node.say(tokens(frame.stream, 1, 0, *(part[:1] for part in words("Hi"))))  # type: ignore[arg-type]
    await socket.send_json({"type": "response.cancel", "response_id": frame.stream})
    last = (await until_end(socket))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
    _, cancel = await router.links.cancels.get()
    assert cancel.stream == frame.stream


async def test_extension_events_go_only_to_clients_that_offered_them(router: FakeRouter, anyone: ClientSession) -> None:
    node = router.links.node("eu")
    node.come_up()
    offered = ("responses.v1.json", "edgechat.ext.v1", "openai-insecure-api-key.alice")
    async with anyone.ws_connect(f"{router.ws_url}/v1/responses", protocols=offered) as socket:
        await create(socket)
        _, frame = await router.links.generates.get()
        node.say(Progress(frame.stream, 1, 3, 9))
        node.say(done(frame, 0))
        events = await until_end(socket)
    extensions = [event for event in events if event["type"].startswith("edgechat:")]
    assert extensions == [
        {"type": "edgechat:node", "response_id": frame.stream, "node": "eu", "region": "region-eu"},
        {"type": "edgechat:progress", "response_id": frame.stream, "computed": 0, "total": 5},
        {"type": "edgechat:progress", "response_id": frame.stream, "computed": 3, "total": 9},
    ]
    logged = [event["sequence_number"] for event in events if event not in extensions]
    assert logged == list(range(len(logged)))


async def test_what_a_node_refuses_is_an_error_event_and_no_response(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    sentence = "The conversation has 9000 tokens, the model's context holds 2048; shorten it."
    router.links.node("eu", failing("context_length_exceeded", sentence)).come_up()
    await create(socket, stream_id="a")
    event = await socket.receive_json(timeout=10)
    assert (event["type"], event["status"], event["stream_id"]) == ("error", 400, "a")
    assert (event["code"], event["param"], event["message"]) == ("context_length_exceeded", "input", sentence)
    assert router.store.kept == {}
    assert len(router.context.sessions) == 0


@pytest.mark.parametrize("store", [True, False])
async def test_a_client_that_leaves_mid_answer_cancels_at_once_or_after_the_grace(
    router: FakeRouter, anyone: ClientSession, store: bool
) -> None:
    node = router.links.node("eu")
    node.come_up()
    async with anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=KEY) as socket:
        await create(socket, store=store)
        _, frame = await router.links.generates.get()
    if store:
        running = router.context.sessions.find("acme", frame.stream)
        assert running is not None
        await _until(lambda: not running.readers)
        router.clock.mono_s += 29.0
        node.status()
        router.context.on_tick()
        assert router.links.cancels.empty()
        router.clock.mono_s += 1.0
        node.status()
        router.context.on_tick()
    _, cancel = await asyncio.wait_for(router.links.cancels.get(), 10)
    assert cancel.stream == frame.stream
    await _until(lambda: len(router.context.sessions) == 0)
    assert (("acme", frame.stream) in router.store.kept) == store


async def _until(condition: Any) -> None:
    """Let the server's tasks run until `condition` holds; the test's own time limit ends it."""
    while not condition():
        await asyncio.sleep(0)


async def test_an_answer_moves_to_another_node_without_a_repeated_or_missing_word(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    near, far = router.links.node("near"), router.links.node("far", saying("one", " two", " three"))
    near.come_up(0.001)
    far.come_up(0.1)
    await create(socket)
    _, frame = await router.links.generates.get()
    ids, deltas = words("one", " two", " three")
    near.say(tokens(frame.stream, 1, 0, ids[:2], deltas[:2]))
    near.go_down()
    events = await until_end(socket)
    assert [event["delta"] for event in events if "delta" in event] == ["one", " two", " three"]
    assert events[-1]["type"] == "response.completed"
    _, second = await router.links.generates.get()
    assert (second.epoch, second.output_ids) == (2, ids[:2])


async def test_a_silent_node_loses_its_stream_and_is_told_so(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    near, far = router.links.node("near"), router.links.node("far", saying("Hi"))
    near.come_up(0.001)
    far.come_up(0.1)
    await create(socket)
    await router.links.generates.get()
    router.clock.mono_s += 2.0
    far.status()
    router.context.on_tick()
    assert (await until_end(socket))[-1]["type"] == "response.completed"
    silent, cancel = await router.links.cancels.get()
    assert (silent.hello.name, cancel.epoch) == ("near", 1)


async def test_an_answer_stays_with_a_suspect_node_that_nobody_can_replace(
    router: FakeRouter, socket: ClientWebSocketResponse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "router.sessions")
    node = router.links.node("eu")
    node.come_up()
    await create(socket)
    _, frame = await router.links.generates.get()
    caplog.clear()
    router.clock.mono_s += 2.0
    for _ in range(2):
        router.context.on_tick()
    ids, deltas = words("one", " two")
    node.say(tokens(frame.stream, 1, 0, ids, deltas))
    node.status()
    router.context.on_tick()
    node.say(done(frame, 3))
    events = await until_end(socket)
    assert [event["delta"] for event in events if "delta" in event] == ["one", " two"]
    assert events[-1]["type"] == "response.completed"
    assert router.links.cancels.empty()
    assert [record.getMessage() for record in caplog.records] == [
        "node eu has not vouched for itself in time: it is given nothing new",
        "node eu is trusted again",
    ]


async def test_an_answer_leaves_a_suspect_node_when_another_becomes_able(
    router: FakeRouter, socket: ClientWebSocketResponse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "router.sessions")
    near, far = router.links.node("near"), router.links.node("far", saying("one", " two"))
    near.come_up()
    await create(socket)
    _, frame = await router.links.generates.get()
    ids, deltas = words("one", " two")
    near.say(tokens(frame.stream, 1, 0, ids[:1], deltas[:1]))
    router.wait_s(2.0)
    assert router.links.cancels.empty()
    far.come_up()
    router.context.on_tick()
    events = await until_end(socket)
    assert [event["delta"] for event in events if "delta" in event] == ["one", " two"]
    assert events[-1]["type"] == "response.completed"
    silent, cancel = await router.links.cancels.get()
    assert (silent.hello.name, cancel.epoch) == ("near", 1)
    assert f"stream {frame.stream} moves from node near to far after 1 ids (failover)" in caplog.messages


async def test_an_answer_leaves_a_node_as_soon_as_that_does_not_vouch_for_its_engine(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    node = router.links.node("eu")
    node.come_up()
    await create(socket)
    await router.links.generates.get()
    router.links.node("us", saying("one", " two")).come_up()
    node.status(vouched=False)
    events = await until_end(socket)
    assert [event["delta"] for event in events if "delta" in event] == ["one", " two"]


async def test_a_long_step_of_a_node_that_vouches_for_its_engine_moves_nothing(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    node = router.links.node("eu")
    node.come_up()
    await create(socket)
    _, frame = await router.links.generates.get()
    other = router.links.node("us", saying("one", " two"))
    other.come_up()
    for _ in range(60):
        node.status()
        other.status()
        router.wait_s(0.25)
    assert router.links.cancels.empty() and router.links.generates.empty()
    for said in saying("one", " two")(frame):
        node.say(said)
    events = await until_end(socket)
    assert [event["delta"] for event in events if "delta" in event] == ["one", " two"]


async def test_an_answer_on_a_suspect_node_whose_link_breaks_waits_for_another(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    node = router.links.node("eu")
    node.come_up()
    await create(socket)
    await router.links.generates.get()
    router.wait_s(2.0)
    node.go_down()
    router.links.node("us", saying("one", " two")).come_up()
    events = await until_end(socket)
    assert [event["delta"] for event in events if "delta" in event] == ["one", " two"]


async def test_an_answer_that_lost_its_node_fails_retryably_when_no_other_comes(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    node = router.links.node("eu")
    node.come_up()
    await create(socket)
    await router.links.generates.get()
    node.go_down()
    router.wait_s(14.0)
    assert len(router.context.sessions) == 1
    router.wait_s(1.0)
    failed = (await until_end(socket))[-1]["response"]
    assert (failed["error"]["edgechat_code"], failed["error"]["retryable"]) == ("node_lost", True)
    assert "'eu'" in failed["error"]["message"]
    assert "ws://" not in failed["error"]["message"]
    assert ("acme", failed["id"]) in router.store.kept


async def test_an_answer_that_lost_its_node_goes_on_with_the_same_one_when_it_is_back(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    node = router.links.node("eu")
    node.come_up()
    await create(socket)
    _, frame = await router.links.generates.get()
    ids, deltas = words("one", " two")
    node.say(tokens(frame.stream, 1, 0, ids[:1], deltas[:1]))
    node.go_down()
    router.wait_s(5.0)
    node.script = saying("one", " two")
    node.come_up()
    events = await until_end(socket)
    assert [event["delta"] for event in events if "delta" in event] == ["one", " two"]
    assert events[-1]["type"] == "response.completed"


async def test_an_answer_that_lost_its_engine_waits_for_the_next_engine_of_that_node(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    node = router.links.node("eu")
    node.come_up()
    await create(socket)
    _, frame = await router.links.generates.get()
    node.say(Failed(frame.stream, 1, "engine_lost", True, "The engine died."))
    node.status(state="failed", engine_pid=0)
    router.wait_s(0.25)
    assert len(router.context.sessions) == 1
    node.script = saying("one", " two")
    node.status(engine_pid=78)
    events = await until_end(socket)
    assert events[-1]["type"] == "response.completed"


async def test_a_draining_node_hands_its_answers_over(router: FakeRouter, socket: ClientWebSocketResponse) -> None:
    near, far = router.links.node("near"), router.links.node("far", saying("one", " two"))
    near.come_up()
    await create(socket)
    _, frame = await router.links.generates.get()
    ids, deltas = words("one", " two")
    near.say(tokens(frame.stream, 1, 0, ids[:1], deltas[:1]))
    near.say(Drain(5.0))
    assert router.links.cancels.empty()
    far.come_up()
    router.wait_s(0.25)
    events = await until_end(socket)
    assert [event["delta"] for event in events if "delta" in event] == ["one", " two"]
    left, cancel = await router.links.cancels.get()
    assert (left.hello.name, cancel.epoch) == ("near", 1)


async def test_nothing_is_told_before_the_store_has_it(router: FakeRouter, socket: ClientWebSocketResponse) -> None:
    node = router.links.node("eu")
    node.come_up()
    await create(socket)
    _, frame = await router.links.generates.get()
    assert [(await socket.receive_json(timeout=10))["type"] for _ in range(2)] == [
        "response.created",
        "response.in_progress",
    ]
    router.store.open.clear()
    for said in saying("Hi")(frame):
        node.say(said)
    pending = asyncio.ensure_future(until_end(socket))
    await router.store.blocked.wait()
    assert (pending.done(), router.store.kept, len(router.context.sessions)) == (False, {}, 1)
    router.store.open.set()
    last = (await pending)[-1]
    assert ("acme", last["response"]["id"]) in router.store.kept


async def test_a_request_that_cannot_be_written_down_is_refused_retryably(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    router.store.full = True
    await create(socket)
    error = await socket.receive_json(timeout=10)
    assert (error["type"], error["code"], error["status"]) == ("error", "store_unavailable", 503)
    assert error["retry_after_ms"] > 0


async def test_an_answer_that_cannot_be_written_any_more_stops_and_goes_on_when_it_can(
    router: FakeRouter, socket: ClientWebSocketResponse
) -> None:
    node = router.links.node("eu")
    node.come_up()
    await create(socket)
    _, frame = await router.links.generates.get()
    created = await socket.receive_json(timeout=10)
    await socket.receive_json(timeout=10)
    router.store.full = True
    ids, deltas = words("one", " two")
    node.say(tokens(frame.stream, 1, 0, ids[:1], deltas[:1]))
    error = await socket.receive_json(timeout=10)
    assert (error["type"], error["code"], error["sequence_number"]) == ("error", "store_unavailable", 0)
    assert len(router.context.sessions) == 0
    router.store.full = False
    node.script = saying("one", " two")
    sessions = router.context.sessions
    await router.context.keeper.look_once(sessions.__contains__, sessions.adopt)
    response_id = created["response"]["id"]
    await _until(lambda: ("acme", response_id) in router.store.kept)
    assert router.store.kept["acme", response_id].ids == ids


async def test_shutdown_closes_with_1012_and_cancels_what_runs(anyone: ClientSession) -> None:
    async with running_router() as router:
        router.links.node("eu").come_up()
        socket = await anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=KEY)
        await create(socket, store=False)
        await router.links.generates.get()
        assert (await socket.receive_json(timeout=10))["type"] == "response.created"
        reading = asyncio.create_task(_last(socket))
    assert await reading is WSMsgType.CLOSE
    assert socket.close_code == 1012
    assert not router.links.cancels.empty()
    assert len(router.context.sessions) == 0


async def _last(socket: ClientWebSocketResponse) -> WSMsgType:
    while (message := await socket.receive(timeout=10)).type is WSMsgType.TEXT:
        pass
    return message.type


async def test_a_connection_that_lived_long_enough_is_told_and_closed(anyone: ClientSession) -> None:
    limits = msgspec.structs.replace(CONFIG.limits, connection_life_s=1)
    async with (
        running_router(msgspec.structs.replace(CONFIG, limits=limits)) as router,
        anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=KEY) as socket,
    ):
        event = await socket.receive_json(timeout=30)
        assert event["code"] == "websocket_connection_limit_reached"
        assert await _last(socket) is WSMsgType.CLOSE
        assert socket.close_code == 1001


@pytest.mark.parametrize("on", [True, False])
async def test_compression_is_negotiated_only_where_the_operator_wants_it(anyone: ClientSession, on: bool) -> None:
    listen = msgspec.structs.replace(CONFIG.listen, compression=on)
    async with running_router(msgspec.structs.replace(CONFIG, listen=listen)) as router:
        router.links.node("eu", saying("Hi")).come_up()
        async with anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=KEY, compress=15) as socket:
            assert ("permessage-deflate" in socket._response.headers.get("Sec-WebSocket-Extensions", "")) == on
            await create(socket)
            assert (await until_end(socket))[-1]["type"] == "response.completed"


async def test_a_client_still_sending_far_too_much_learns_why_it_is_closed(router: FakeRouter) -> None:
    def send_too_much() -> int | None:
        with connect(f"{router.ws_url}/v1/responses", additional_headers=KEY) as socket:
            with pytest.raises(ConnectionClosed) as closed:
                socket.send("x" * (32 * 1024 * 1024))
                socket.recv(timeout=20)
            return closed.value.rcvd.code if closed.value.rcvd else None

    assert await asyncio.to_thread(send_too_much) == 1009


async def test_a_reader_that_stalls_is_cut_off_and_nobody_else_notices(
    router: FakeRouter, anyone: ClientSession
) -> None:
    node = router.links.node("eu")
    node.come_up()
    stalled, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=1)
    writer.write(
        b"GET /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer alice\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    create_frame = json.dumps({"type": "response.create", "model": MODEL, "input": "hi", "store": False}).encode()
    writer.write(bytes([0x81, 0x80 | len(create_frame), 0, 0, 0, 0]) + create_frame)
    _, frame = await router.links.generates.get()
    async with anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=KEY) as other:
        await create(other)
        _, others = await router.links.generates.get()
        seq, ids, deltas = 0, *words("x" * 1_000_000)
        while router.links.cancels.empty():
            node.say(tokens(frame.stream, 1, seq, ids[:1], deltas[:1] if seq == 0 else [[deltas[0][1]]]))
            seq += 1
            await asyncio.sleep(0)
            router.context.on_tick()
        node.say(done(others, 0))
        assert (await until_end(other))[-1]["type"] == "response.completed"
    _, cancel = await router.links.cancels.get()
    assert cancel.stream == frame.stream
    writer.close()
    assert stalled.at_eof() is False
