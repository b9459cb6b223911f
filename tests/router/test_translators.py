"""The pure translators: what is taken, what is refused and with which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import ResponseErrorEvent
from openai.types.responses.responses_server_event import ResponseWsError
from pydantic import TypeAdapter

from core.conversation import Item
from core.errors import ContextTooLong, EdgechatError, NoNodeAvailable, RequestError
from core.frames import Arguments, Delta, ItemEnd, ItemStart, Logprobs, Text, Usage
from core.limits import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, MAX_STOP_CHARACTERS
from core.stream import EndRecord, Failure, replay
from router.api import chat_completions, shim
from router.api.call import Call, parse_json, rendered
from router.api.errors import error_event, from_failure, http_body, http_headers
from router.api.responses import LOGPROBS, Cancel, Create, parse_create, parse_event
from router.config import Defaults
from tests.router.fakes import MODEL, record, words

DEFAULTS = Defaults()
BODY: dict[str, Any] = {"model": MODEL, "input": "hi"}
SCHEMA: dict[str, Any] = {"type": "json_schema", "name": "river", "schema": {"type": "object"}}
F, G = ({"type": "function", "name": name, "parameters": {"type": "object"}} for name in "fg")
ALLOWED: dict[str, Any] = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}
NESTED = "response_format.json_schema."
HUGE: dict[str, Any] = {"name": "a", "schema": {"const": "x" * MAX_SCHEMA_BYTES}}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def nested(depth: int) -> dict[str, Any]:
    """An object in an object in an object ..."""
    return {"items": nested(depth - 1)} if depth > 1 else {}


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
    call = create(tools=[{"type": "web_search"}, function], sparkle=1, include=["something.new"])
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
        ({"max_output_tokens": 10**30}, "max_output_tokens"),
        ({"max_tool_calls": 10**30}, "max_tool_calls"),
        ({"top_k": 10**30}, "top_k"),
        ({"truncation": "some"}, "truncation"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"seed": -1}, "seed"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"include": "message.output_text.logprobs"}, "include"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"01": 1}}, "logit_bias"),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"service_tier": 1}, "service_tier"),
        ({"edgechat:exact": "yes"}, "edgechat:exact"),
        ({"edgechat:deadline_s": 0}, "edgechat:deadline_s"),
        ({"edgechat:deadline_s": 3601}, "edgechat:deadline_s"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format"),
        ({"text": {"format": SCHEMA | {"name": "a b"}}}, "text.format.name"),
        ({"text": {"format": SCHEMA | {"name": "a\n"}}}, "text.format.name"),
        ({"text": {"format": SCHEMA | {"name": "a" * 65}}}, "text.format.name"),
        ({"text": {"format": SCHEMA | {"schema": []}}}, "text.format.schema"),
        ({"text": {"format": SCHEMA | {"schema": {"const": "x" * MAX_SCHEMA_BYTES}}}}, "text.format.schema"),
        ({"text": {"format": SCHEMA | {"schema": nested(MAX_SCHEMA_DEPTH + 1)}}}, "text.format.schema"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": []}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": ALLOWED | {"mode": "required"}, "tools": [F, G]}, "tool_choice"),
        ({"tool_choice": ALLOWED, "tools": [G]}, "tool_choice"),
        ({"reasoning": {"effort": "heroic"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "bogus"}}, "reasoning.summary"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "web_search"}, F | {"name": ""}]}, "tools[1].name"),
        ({"tools": [F | {"name": "a\nb <|end|>"}]}, "tools[0].name"),
        ({"tools": [F | {"name": "f\n"}]}, "tools[0].name"),
        ({"tools": [F | {"description": 5}]}, "tools[0].description"),
        ({"tools": [F | {"strict": "x"}]}, "tools[0].strict"),
        ({"tools": [F | {"parameters": []}]}, "tools[0].parameters"),
        ({"tools": [F, G, F]}, "tools[2].name"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": "a" * (MAX_STOP_CHARACTERS + 1)}, "stop"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        create(**changes)
    assert caught.value.param == param


# -- what both dialects take ----------------------------------------------------------------------

KNOBS: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": -0.3,
    "logit_bias": {"0": -100, "17": 2.5},
    "top_logprobs": 20,
    "stop": "END",
    "service_tier": "flex",
    "edgechat:exact": True,
    "edgechat:deadline_s": 2.5,
}
PARSERS: list[Callable[..., Call]] = [
    lambda **changes: parse_create(BODY | changes, DEFAULTS),
    lambda **changes: chat_completions.parse_chat(CHAT | {"logprobs": True} | changes, DEFAULTS).call,
]


@pytest.mark.parametrize("parse", PARSERS, ids=["responses", "chat"])
def test_both_dialects_take_the_same_settings(parse: Callable[..., Call]) -> None:
    request = parse(**KNOBS).request
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "top_logprobs", "service_tier"):
        assert getattr(request, name) == KNOBS[name]
    assert (request.presence_penalty, request.frequency_penalty) == (0.2, -0.3)
    assert (request.logit_bias, request.stop, request.logprobs) == ([(0, -100.0), (17, 2.5)], ["END"], True)
    assert (request.exact, request.deadline_s) == (True, 2.5)


@pytest.mark.parametrize("parse", PARSERS, ids=["responses", "chat"])
@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({}, False),
        ({"seed": 0}, True),
        ({"seed": 1, "edgechat:exact": False}, False),
        ({"edgechat:exact": True}, True),
    ],
)
def test_who_names_a_seed_gets_an_exact_answer_unless_told_otherwise(
    parse: Callable[..., Call], changes: dict[str, Any], exact: bool
) -> None:
    assert parse(**changes).request.exact is exact


@pytest.mark.parametrize("parse", PARSERS, ids=["responses", "chat"])
@pytest.mark.parametrize(
    ("asked", "effective"),
    [(None, "default"), ("auto", "default"), ("flex", "flex"), ("priority", "default"), ("new", "default")],
)
def test_going_last_can_be_asked_for_and_going_first_cannot(
    parse: Callable[..., Call], asked: str | None, effective: str
) -> None:
    assert parse(service_tier=asked).request.service_tier == effective


@pytest.mark.parametrize(
    ("changes", "asked"),
    [({}, False), ({"top_logprobs": 0}, False), ({"top_logprobs": 1}, True), ({"include": [LOGPROBS]}, True)],
)
def test_a_response_has_log_probabilities_if_they_are_included_or_counted(changes: dict[str, Any], asked: bool) -> None:
    assert create(**changes).request.logprobs is asked


def test_a_schema_is_the_same_in_both_dialects() -> None:
    described = {"name": "river", "description": "A river.", "schema": {"type": "object"}, "strict": True}
    flat = create(text={"format": {"type": "json_schema", **described}, "verbosity": "low"}).request.text
    nested = PARSERS[1](response_format={"type": "json_schema", "json_schema": described}).request.text
    assert flat == nested == {"format": {"type": "json_schema", **described}}


def test_a_schema_may_be_as_deep_as_a_refusal_says() -> None:
    schema = nested(MAX_SCHEMA_DEPTH)
    assert create(text={"format": SCHEMA | {"schema": schema}}).request.text["format"]["schema"] == schema


@pytest.mark.parametrize("kind", ["text", "json_object"])
def test_a_format_without_a_schema_is_the_same_in_both_dialects(kind: str) -> None:
    for request in (create(text={"format": {"type": kind}}), PARSERS[1](response_format={"type": kind})):
        assert request.request.text == {"format": {"type": kind}}


@pytest.mark.parametrize(
    ("asked", "effective"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("none", "none"),
        ({"type": "function", "name": "f"}, ALLOWED),
        (ALLOWED, ALLOWED),
        (ALLOWED | {"tools": [{"type": "web_search"}, *ALLOWED["tools"]]}, ALLOWED),
    ],
)
def test_a_tool_choice_is_echoed_as_what_is_done_about_it(asked: Any, effective: Any) -> None:
    request = create(tools=[F, G], tool_choice=asked).request
    assert request.tool_choice == effective
    assert [tool["name"] for tool in request.tools] == ["f", "g"]


@pytest.mark.parametrize(
    "asked",
    [
        {"type": "function", "function": {"name": "f"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]},
        },
    ],
)
def test_a_tool_choice_of_a_chat_means_the_same(asked: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": tool} for tool in (F, G)]
    assert PARSERS[1](tools=tools, tool_choice=asked).request.tool_choice == ALLOWED


@pytest.mark.parametrize("missing", ["model", "input"])
def test_a_missing_field_is_named(missing: str) -> None:
    body = {name: value for name, value in BODY.items() if name != missing}
    with pytest.raises(RequestError, match=f"`{missing}` is missing") as caught:
        parse_create(body, DEFAULTS)
    assert caught.value.param == missing


@pytest.mark.parametrize(("asked", "effective"), [("minimal", "low"), ("medium", "medium"), ("xhigh", "high")])
def test_the_effective_effort_is_kept(asked: str, effective: str) -> None:
    assert create(reasoning={"effort": asked}).request.reasoning == {"effort": effective, "summary": None}


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "nul", "[" * 100_000, '{"a": NaN}'])
def test_what_is_not_a_json_object_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="JSON") as caught:
        parse_json(text)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("escaped", [r"\ud800", r"\ud800 and more", r"\udc00", r"\ud800\u0041"])
@pytest.mark.parametrize("made", [str, str.encode])
def test_half_a_surrogate_pair_is_no_valid_unicode(escaped: str, made: Callable[[str], str | bytes]) -> None:
    for text in (f'{{"a": ["{escaped}"]}}', f'{{"{escaped}": 1}}'):
        with pytest.raises(RequestError, match="no valid Unicode") as caught:
            parse_json(made(text))
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
    ("code", "status"),
    [
        ("context_length_exceeded", 400),
        ("unsupported_parameter", 400),
        ("node_lost", 502),
        ("overloaded", 503),
        ("deadline_exceeded", 504),
        ("strange", 500),
    ],
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


@pytest.mark.parametrize("empty", [{}, {"tool_calls": None}, {"tool_calls": []}])
def test_an_assistants_message_of_a_chat_that_says_nothing_is_empty_text(empty: dict[str, Any]) -> None:
    said = {"role": "assistant", "content": None} | empty
    made = PARSERS[1](messages=[*CHAT["messages"], said, *CHAT["messages"]])
    assert made.request.input[1] == Item("message", "assistant", "")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 2}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": SCHEMA | {"name": ""}}}, NESTED + "name"),
        ({"response_format": {"type": "json_schema", "json_schema": SCHEMA | {"schema": 1}}}, NESTED + "schema"),
        ({"response_format": {"type": "json_schema", "json_schema": HUGE}}, NESTED + "schema"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": F | {"strict": "x"}}]}, "tools[0].function.strict"),
        ({"tools": [{"type": "function", "function": 5}]}, "tools[0].function.name"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, None),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
        ({"reasoning_effort": "bogus"}, "reasoning_effort"),
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
    events = replay(record(reasoning={}), _calling()[1], end)
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
    made = chat_completions.completion(replay(record(), _calling()[1], end)[-1]["response"])
    message = made["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (None, "hm")
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert made["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_a_completion_that_said_nothing_is_empty_text() -> None:
    end = EndRecord(status="completed", completed_at=1, usage=Usage(3, 0, 0))
    choice = chat_completions.completion(replay(record(), [], end)[-1]["response"])["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")


def _spelled(*, asked: bool) -> list[dict[str, Any]]:
    """The events of an answer whose last id is held back and turns out to be a stop string."""
    ids, deltas = words("Hi", " there")
    for index, text in enumerate((b"Hi", b" there")):
        deltas[index].insert(-1, Logprobs(-0.5, [(ids[index], -0.5)], text, [text]))
    deltas.insert(2, [Logprobs(-1.5, [], b"EN")])
    end = EndRecord(status="completed", completed_at=1, usage=Usage(3, 0, 4))
    return replay(record(logprobs=asked), deltas, end)


def test_a_chat_carries_each_log_probability_once_whole_and_streamed() -> None:
    events = _spelled(asked=True)
    whole = ChatCompletion.model_validate(chat_completions.completion(events[-1]["response"], logprobs=True))
    stream = chat_completions.ChatStream(events[0]["response"], include_usage=False)
    chunks = [ChatCompletionChunk.model_validate(chunk) for event in events for chunk in stream.on_event(event)]
    streamed = [entry for chunk in chunks if (told := chunk.choices[0].logprobs) for entry in told.content or []]
    assert whole.choices[0].logprobs is not None
    assert [(entry.token, entry.logprob, entry.bytes) for entry in whole.choices[0].logprobs.content or []] == [
        ("Hi", -0.5, list(b"Hi")),
        (" there", -0.5, list(b" there")),
    ]
    assert [entry.model_dump() for entry in streamed] == [
        entry.model_dump() for entry in whole.choices[0].logprobs.content or []
    ]
    assert streamed[0].top_logprobs[0].token == "Hi"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hi there"


def test_a_chat_that_did_not_ask_has_no_log_probabilities() -> None:
    events = _spelled(asked=False)
    assert chat_completions.completion(events[-1]["response"])["choices"][0]["logprobs"] is None
    stream = chat_completions.ChatStream(events[0]["response"], include_usage=False)
    assert all(chunk["choices"][0]["logprobs"] is None for event in events for chunk in stream.on_event(event))


def test_a_chat_says_how_it_was_served() -> None:
    end = EndRecord(status="completed", completed_at=1, usage=Usage(3, 0, 0))
    events = replay(record(service_tier="flex"), [], end)
    assert chat_completions.completion(events[-1]["response"])["service_tier"] == "flex"


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
