"""Bad input gets one clear sentence and costs nobody anything."""

from __future__ import annotations

import json
from urllib.request import Request

import openai
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.e2e.clients import MODEL, answer, raw_socket, receive, say, sdk
from tests.e2e.processes import Fleet
from tests.e2e.waiting import DIRECT, http


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("{not json", 400),
        ("[]", 400),
        ('{"no": "type"}', 400),
        ('{"type": "response.fly"}', 400),
        ('{"type": "response.create", "input": "hi"}', 400),
        ('{"type": "response.create", "model": "smollm2-135m"}', 400),
        ('{"type": "response.create", "model": "smollm2-135m", "input": 7}', 400),
        ('{"type": "response.create", "model": "smollm2-135m", "input": "hi", "temperature": "hot"}', 400),
        ('{"type": "response.cancel"}', 400),
    ],
)
def test_a_bad_event_is_answered_and_the_connection_goes_on(fleet: Fleet, sent: str, status: int) -> None:
    with raw_socket(fleet) as socket:
        socket.send(sent)
        refusal = receive(socket)
        assert (refusal["type"], refusal["status"], refusal["sequence_number"]) == ("error", status, 0)
        assert refusal["error"]["message"] == refusal["message"]
        assert "Traceback" not in json.dumps(refusal)
        assert answer(socket, input="hi", max_output_tokens=2)


def test_an_oversized_frame_closes_with_1009(fleet: Fleet) -> None:
    with raw_socket(fleet) as socket, pytest.raises(ConnectionClosed) as closed:
        socket.send("x" * (32 * 1024 * 1024))
        socket.recv(timeout=20)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


def test_a_wrong_key_is_refused_at_the_handshake(fleet: Fleet) -> None:
    with pytest.raises(InvalidStatus) as refused, raw_socket(fleet, key="wrong"):
        pass
    assert refused.value.response.status_code == 401
    with pytest.raises(openai.AuthenticationError):
        sdk(fleet, key="wrong").responses.create(model=MODEL, input="hi")


def test_an_unknown_model_is_answered_with_those_there_are(fleet: Fleet) -> None:
    with raw_socket(fleet) as socket:
        say(socket, model="gpt-9", input="hi")
        refusal = receive(socket)
    assert (refusal["status"], refusal["code"]) == (404, "model_not_found")
    assert MODEL in refusal["message"]
    with pytest.raises(openai.NotFoundError, match=MODEL):
        sdk(fleet).responses.create(model="gpt-9", input="hi")


def test_a_context_that_is_too_long_is_told_both_numbers(fleet: Fleet) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk(fleet).responses.create(model=MODEL, input="river " * 9000)
    assert refused.value.code == "context_length_exceeded"
    numbers = [int(word.strip(",;.")) for word in refused.value.message.split() if word.strip(",;.").isdigit()]
    assert len(numbers) >= 2
    assert max(numbers) > 9000


def test_a_context_that_is_too_long_is_refused_before_any_stream_begins(fleet: Fleet) -> None:
    long = "river " * 9000
    with raw_socket(fleet) as socket:
        say(socket, input=long)
        refusal = receive(socket)
    assert (refusal["type"], refusal["status"], refusal["code"]) == ("error", 400, "context_length_exceeded")
    body = {"model": MODEL, "input": long, "stream": True}
    assert http(f"{fleet.base_url}/responses", method="POST", body=body).status == 400


def test_another_origin_may_not_use_the_developers_key(fleet: Fleet) -> None:
    assert http(f"{fleet.url}/v1/models").status == 200
    request = Request(
        f"{fleet.url}/v1/models", headers={"Authorization": "Bearer dev", "Origin": "http://evil.example"}
    )
    with pytest.raises(OSError, match="403"):
        DIRECT.open(request)


def test_what_is_not_built_yet_says_so(fleet: Fleet) -> None:
    reply = http(f"{fleet.base_url}/responses/compact", method="POST", body={"model": MODEL})
    assert reply.status == 501
    assert reply.json()["error"]["code"] == "not_implemented"


def test_operations_need_the_admin_role_and_health_needs_no_key(fleet: Fleet) -> None:
    assert http(f"{fleet.url}/fleet", key=None).status == 401
    assert http(f"{fleet.url}/metrics", key=None).status == 401
    assert http(f"{fleet.url}/livez", key=None).status == 200
    assert http(f"{fleet.url}/readyz", key=None).status == 200
    nodes = http(f"{fleet.url}/fleet").json()["nodes"]
    assert {node["name"] for node in nodes} == {"eu", "us"}
    for node in nodes:
        assert {"region", "release", "pid", "engine_pid", "state", "running"} <= node.keys()
