"""The pure translators: what is taken, what is refused and with which words."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses import ResponseErrorEvent
from openai.types.responses.responses_server_event import ResponseWsError
from pydantic import TypeAdapter

from core.conversation import Item
from core.errors import ContextTooLong, EdgechatError, NoNodeAvailable, RequestError
from core.frames import Arguments, Delta, ItemEnd, ItemStart, Text, Usage
from core.stream import EndRecord, Failure, replay
from router.api import chat_completions, shim
from router.api.call import parse_json, rendered
from router.api.errors import error_event, from_failure, http_body, http_headers
from router.api.responses import Cancel, Create, parse_create, parse_event
from router.config import Defaults
from tests.router.fakes import MODEL, record, words

DEFAULTS = Defaults()
BODY: dict[str, Any] = {"model": MODEL, "input": "hi"}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def create(**changes: Any) -> Any:
    return parse_create(BODY | changes, DEFAULTS)


def test_defaults_fill_what_the_client_left_out() -> None:
    call = create()
    request = call.request
    assert (request.temperature, request.top_p, request.max_output_tokens) == (0.7, 0.95, 1024)
    assert (request.store, request.truncation, call.stream, call.generate) == (True, "disabled", False, True)
    assert request.input == [Item("message", "user", "hi")]


def test_zero_is_a_value_and_null_is_none() -> None:
    request = create(temperature=0, top_p=None, store=None).request
    assert (request.temperature, request.top_p, request.store) == (0.0, 0.95, True)


def test_unknown_fields_and_hosted_tools_are_ignored() -> None:
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    call = create(tools=[{"type": "web_search"}, function], service_tier="flex", sparkle=1)
    assert call.request.tools == [function | {"description": None, "strict": None}]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"truncation": "some"}, "truncation"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"seed": -1}, "seed"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"reasoning": {"effort": "heroic"}}, "reasoning.effort"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"stop": ["a"] * 5}, "stop"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        create(**changes)
    assert caught.value.param == param


@pytest.mark.parametrize("missing", ["model", "input"])
def test_a_missing_field_is_named(missing: str) -> None:
    body = {name: value for name, value in BODY.items() if name != missing}
    with pytest.raises(RequestError, match=f"`{missing}` is missing") as caught:
        parse_create(body, DEFAULTS)
    assert caught.value.param == missing


@pytest.mark.parametrize(("asked", "effective"), [("minimal", "low"), ("medium", "medium"), ("xhigh", "high")])
def test_the_effective_effort_is_kept(asked: str, effective: str) -> None:
    assert create(reasoning={"effort": asked}).request.reasoning == {"effort": effective, "summary": None}


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "nul", '{"a": "\\ud800"}', "[" * 100_000, '{"a": NaN}'])
def test_what_is_not_a_json_object_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="JSON") as caught:
        parse_json(text)
    assert caught.value.code == "invalid_json"


def test_client_events_are_told_apart() -> None:
    assert isinstance(parse_event('{"type":"response.create","model":"tiny","input":"hi"}', DEFAULTS), Create)
    assert parse_event('{"type":"response.cancel","response_id":"resp_1"}', DEFAULTS) == Cancel("resp_1")
    for text, param in [("{}", "type"), ('{"type":"x"}', "type"), ('{"type":"response.cancel"}', "response_id")]:
        with pytest.raises(RequestError) as caught:
            parse_event(text, DEFAULTS)
        assert caught.value.param == param


def test_instructions_come_first_and_history_before_the_input() -> None:
    request = create(instructions="Be brief.").request
    past = [Item("message", "user", "before"), Item("message", "assistant", "said")]
    assert [item.text for item in rendered(request, past)] == ["Be brief.", "before", "said", "hi"]


# -- errors --------------------------------------------------------------------------------------


def test_an_error_event_has_both_forms_and_is_valid_under_either_model_of_the_sdk() -> None:
    event = error_event(NoNodeAvailable(MODEL, retry_after_s=1.5), "lane")
    TypeAdapter(ResponseErrorEvent).validate_python(event)
    TypeAdapter(ResponseWsError).validate_python(event)
    assert (event["status"], event["code"], event["error"]["code"]) == (503, "no_node_available", "no_node_available")
    assert (event["retry_after_ms"], event["stream_id"], event["sequence_number"]) == (1500, "lane", 0)


def test_an_http_error_has_openais_shape_and_says_when_to_come_back() -> None:
    body = http_body(ContextTooLong(9000, 2048))["error"]
    assert (body["type"], body["code"], body["param"]) == (
        "invalid_request_error",
        "context_length_exceeded",
        "input",
    )
    assert http_headers(NoNodeAvailable(MODEL, retry_after_s=1.2)) == {"retry-after": "2"}
    assert http_headers(ContextTooLong(1, 1)) == {}


@pytest.mark.parametrize(
    ("code", "status"), [("context_length_exceeded", 400), ("node_lost", 502), ("overloaded", 503), ("strange", 500)]
)
def test_a_failed_response_becomes_the_error_of_its_code(code: str, status: int) -> None:
    error = from_failure(Failure(code, "It broke.", True))
    assert (error.code, error.status, error.message, error.retryable) == (code, status, "It broke.", True)


# -- chat completions ----------------------------------------------------------------------------


def test_a_chat_becomes_items_of_the_same_conversation() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    made = chat_completions.parse_chat(CHAT | {"messages": messages}, DEFAULTS).call
    assert [(item.kind, item.role, item.text) for item in made.request.input] == [
        ("message", "system", "Be brief."),
        ("message", "user", "hi"),
        ("function_call", "assistant", "{}"),
        ("function_call_output", "tool", "42"),
        ("message", "assistant", "It is 42."),
    ]
    assert (made.request.store, made.prefix) == (False, "chatcmpl")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, None),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_chat_field_that_cannot_be_used_is_named(changes: dict[str, Any], param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        chat_completions.parse_chat(CHAT | changes, DEFAULTS)
    assert param is None or caught.value.param == param


def _calling() -> tuple[list[int], list[list[Delta]]]:
    ids = [1, 2, 3, 4, 5, 6]
    deltas: list[list[Delta]] = [
        [ItemStart("reasoning"), Text("hm")],
        [ItemEnd()],
        [ItemStart("function_call", name="f"), Arguments('{"a":')],
        [Arguments("1}")],
        [ItemEnd()],
        [],
    ]
    return ids, deltas


def test_a_tool_call_streams_as_chunks_and_ends_with_tool_calls() -> None:
    end = EndRecord(status="completed", completed_at=1, usage=Usage(3, 0, 6))
    events = replay(record(reasoning={}), *_calling(), end)
    stream = chat_completions.ChatStream(events[0]["response"], include_usage=False)
    deltas = [chunk["choices"][0] for event in events for chunk in stream.on_event(event)]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert deltas[1]["delta"]["reasoning_content"] == "hm"
    calls = [choice["delta"]["tool_calls"][0] for choice in deltas if "tool_calls" in choice["delta"]]
    assert calls[0]["function"]["name"] == "f"
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a":1}'
    assert deltas[-1]["finish_reason"] == "tool_calls"


def test_a_whole_completion_carries_thought_and_calls_beside_the_content() -> None:
    end = EndRecord(status="completed", completed_at=1, usage=Usage(3, 1, 6))
    made = chat_completions.completion(replay(record(), *_calling(), end)[-1]["response"])
    message = made["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (None, "hm")
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert made["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_a_completion_that_said_nothing_is_empty_text() -> None:
    end = EndRecord(status="completed", completed_at=1, usage=Usage(3, 0, 0))
    choice = chat_completions.completion(replay(record(), [], [], end)[-1]["response"])["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")


# -- the plain dialect ----------------------------------------------------------------------------


def test_a_plain_message_continues_the_connections_conversation() -> None:
    past = [Item("message", "user", "before")]
    call = shim.parse_message('{"text": "hi"}', past, MODEL, DEFAULTS)
    assert (call.request.model, call.request.store, call.history) == (MODEL, False, past)
    assert shim.parse_message('{"text": "hi", "model": "other"}', [], MODEL, DEFAULTS).request.model == "other"
    with pytest.raises(RequestError, match="`text` is missing"):
        shim.parse_message("{}", [], MODEL, DEFAULTS)


def test_a_refusal_of_the_plain_dialect_is_an_error_object() -> None:
    assert shim.refusal(EdgechatError("It broke."))["error"]["message"] == "It broke."
    assert words("a")[1][-1] == [ItemEnd()]
