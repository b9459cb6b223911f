from __future__ import annotations

import json
from typing import Any, Literal, TypeAlias, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from core.conversation import Item, parse_input
from core.frames import Arguments, Delta, ItemEnd, ItemStart, Logprobs, Text, Usage
from core.stream import (
    EndRecord,
    Event,
    Failure,
    Request,
    RequestRecord,
    StreamLog,
    call_id,
    item_id,
    output_items,
    replay,
)

# PROTOCOL: "the embedded `response` object always carries every field of the SDK's model".
RESPONSE_FIELDS = set(
    """id object created_at completed_at status incomplete_details error model previous_response_id instructions output
    tools tool_choice parallel_tool_calls truncation text reasoning temperature top_p presence_penalty
    frequency_penalty top_logprobs usage max_output_tokens max_tool_calls store background service_tier metadata
    safety_identifier prompt_cache_key user""".split()
)
# The SDK's union of events by `type`; validating against the union itself would try every member.
SDK_MODELS: dict[str, type[BaseModel]] = {
    get_args(model.model_fields["type"].annotation)[0]: model for model in get_args(get_args(ResponseStreamEvent)[0])
}
# The API's reference has it and earlier SDKs required it; the installed one ignores it.
BEYOND_THE_SDK = {"response.function_call_arguments.done": {"name"}}
TERMINAL = {"response.completed", "response.incomplete", "response.failed"}
RESPONSE, RELEASE = "resp_r1_abc", "m@0"
USAGE = Usage(11, 8, 3, 1)
COMPLETED = EndRecord(status="completed", completed_at=1_700_000_009, usage=USAGE)
ENDS = [
    COMPLETED,
    EndRecord(status="incomplete", completed_at=1_700_000_009, reason="max_output_tokens", usage=USAGE),
    EndRecord(status="failed", completed_at=1_700_000_009, error=Failure("node_lost", "The node was lost.", True)),
    EndRecord(status="cancelled", completed_at=1_700_000_009, usage=USAGE),
]

Said: TypeAlias = list[list[Delta]]
MESSAGE: Said = [
    [ItemStart("message"), Text("Hel")],
    [Text("lo")],
    [],
    [Logprobs(-0.1, [(3, -0.1)]), Text("!")],
    [ItemEnd()],
]
REASONING: Said = [[ItemStart("reasoning"), Text("Let me ")], [Text("see.")], [ItemEnd()]]
CALL: Said = [[ItemStart("function_call", name="look_up")], [Arguments('{"q":')], [Arguments('"x"}')], [ItemEnd()]]


def record(reasoning: dict[str, Any] | None = None, logprobs: bool = False) -> RequestRecord:
    request = Request(
        model="m",
        input=[Item("message", "user", "hi")],
        temperature=0.7,
        top_p=0.9,
        max_output_tokens=64,
        reasoning=reasoning,
        logprobs=logprobs,
        tools=[{"type": "function", "name": "look_up", "parameters": {"type": "object"}, "strict": False}],
        metadata={"k": "v"},
    )
    return RequestRecord(id=RESPONSE, tenant="t", created_at=1_700_000_000, seed=1, release=RELEASE, request=request)


def log_of(
    said: Said, end: EndRecord = COMPLETED, reasoning: dict[str, Any] | None = None, logprobs: bool = False
) -> list[Event]:
    return replay(record(reasoning, logprobs), said, end)


def types_of(events: list[Event]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
# What a node may say for one id, and also what it should not: items left open, text outside any.
SAID = st.lists(
    st.lists(
        st.one_of(
            st.builds(ItemStart, st.just("message"), st.sampled_from(["", "commentary", "final_answer"])),
            st.builds(ItemStart, st.just("reasoning")),
            st.builds(ItemStart, st.just("function_call"), name=TEXTS),
            st.builds(Text, TEXTS),
            st.builds(Arguments, TEXTS),
            st.just(ItemEnd()),
            st.builds(
                Logprobs,
                st.floats(max_value=0.0, allow_nan=False),
                st.just([(7, -0.5), (8, -1.5)]),
                st.binary(max_size=4),
                st.just([b"a", b"\xf0"]),
            ),
        ),
        max_size=3,
    ),
    max_size=12,
)
ASKED = st.sampled_from([None, {"effort": "low", "summary": None}])


@given(said=SAID, end=st.sampled_from(ENDS), asked=ASKED, logprobs=st.booleans(), cuts=st.lists(st.integers(0, 12)))
def test_frames_of_any_size_give_the_events_of_the_replay(
    said: Said, end: EndRecord, asked: dict[str, Any] | None, logprobs: bool, cuts: list[int]
) -> None:
    log = StreamLog(record(asked, logprobs))
    events = log.open()
    at = 0
    for cut in [*sorted(cuts), len(said)]:
        upto = min(max(cut, at), len(said))
        events += log.extend(said[at:upto])
        at = upto
    events += log.close(end)
    assert msgspec.json.encode(events) == msgspec.json.encode(replay(record(asked, logprobs), said, end))


@given(said=SAID, end=st.sampled_from(ENDS), asked=ASKED)
def test_numbers_count_from_zero_and_exactly_one_terminal_event_comes_last(
    said: Said, end: EndRecord, asked: dict[str, Any] | None
) -> None:
    events = log_of(said, end, asked)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert types_of(events[:2]) == ["created", "in_progress"]
    assert [event["type"] in TERMINAL for event in events] == [False] * (len(events) - 1) + [True]


@given(said=SAID, end=st.sampled_from(ENDS), asked=ASKED, logprobs=st.booleans())
def test_every_event_is_one_that_the_sdk_can_read(
    said: Said, end: EndRecord, asked: dict[str, Any] | None, logprobs: bool
) -> None:
    for event in log_of(said, end, asked, logprobs):
        wire = json.loads(msgspec.json.encode(event))
        read = SDK_MODELS[event["type"]].model_validate(wire)
        unknown = set(read.model_extra or {}) - BEYOND_THE_SDK.get(event["type"], set())
        assert not unknown, f"{event['type']} has fields that the SDK does not know: {unknown}"


@given(said=SAID)
def test_nothing_that_was_said_is_lost(said: Said) -> None:
    spoken = "".join(delta.text for deltas in said for delta in deltas if isinstance(delta, Text | Arguments))
    (final,) = (event for event in log_of(said) if event["type"] in TERMINAL)
    in_log = "".join(item.get("arguments", "") + _content(item) for item in final["response"]["output"])
    in_items = "".join(item.text for item in output_items(RESPONSE, RELEASE, list(range(len(said))), said))
    assert in_log == in_items == spoken


def _content(item: dict[str, Any]) -> str:
    return "".join(part["text"] for part in item.get("content", []))


@given(said=SAID)
def test_items_for_the_next_turn_are_those_that_the_client_saw(said: Said) -> None:
    (final,) = (event for event in log_of(said) if event["type"] in TERMINAL)
    ours = output_items(RESPONSE, RELEASE, list(range(len(said))), said)
    seen = parse_input(final["response"]["output"])
    # What a client sends back lacks only what it never had: the ids and the release that made them.
    assert [msgspec.structs.replace(item, ids=None, release="", phase="") for item in ours] == [
        msgspec.structs.replace(item, phase="") for item in seen
    ]


def test_a_message_streams_in_the_documented_order() -> None:
    events = log_of(MESSAGE)
    assert types_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["delta"] for event in events if "delta" in event] == ["Hel", "lo", "!"]
    assert events[7]["text"] == "Hello!"
    assert events[-1]["response"]["output"] == [events[-2]["item"]]


def test_reasoning_is_streamed_only_to_those_who_asked_and_is_in_the_output_of_all() -> None:
    asked, unasked = log_of(REASONING, reasoning={"effort": "high", "summary": None}), log_of(REASONING)
    deltas = ["reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done"]
    frame = ["created", "in_progress", "output_item.added", "output_item.done", "completed"]
    assert types_of(asked) == [*frame[:3], *deltas, *frame[3:]]
    assert types_of(unasked) == frame
    for events in (asked, unasked):
        (item,) = events[-1]["response"]["output"]
        assert item["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
        assert item["summary"] == []


def test_a_function_call_streams_its_arguments() -> None:
    events = log_of(CALL)
    assert types_of(events)[2:] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    (call,) = events[-1]["response"]["output"]
    assert (call["name"], call["arguments"], call["call_id"]) == ("look_up", '{"q":"x"}', "call_r1_abc_0")


@pytest.mark.parametrize(
    ("end", "type_", "status", "details"),
    [
        (ENDS[0], "response.completed", "completed", None),
        (ENDS[1], "response.incomplete", "incomplete", {"reason": "max_output_tokens"}),
        (ENDS[2], "response.failed", "failed", None),
        (ENDS[3], "response.incomplete", "cancelled", None),
    ],
)
def test_every_way_to_end_has_its_event_and_status(
    end: EndRecord, type_: str, status: str, details: dict[str, str] | None
) -> None:
    last = log_of(MESSAGE[:2], end)[-1]
    response = last["response"]
    assert (last["type"], response["status"], response["incomplete_details"]) == (type_, status, details)
    assert response["completed_at"] == (1_700_000_009 if status == "completed" else None)
    (item,) = response["output"]
    assert item["status"] == ("completed" if status == "completed" else "incomplete")
    assert _content(item) == "Hello"


@pytest.mark.parametrize(
    ("code", "sdk_code"),
    [
        ("node_lost", "server_error"),
        ("overloaded", "rate_limit_exceeded"),
        ("context_length_exceeded", "invalid_prompt"),
        ("something_new", "server_error"),
    ],
)
def test_a_failure_has_a_code_of_the_sdk_and_ours_beside_it(code: str, sdk_code: str) -> None:
    end = EndRecord(status="failed", completed_at=1, error=Failure(code, "It broke.", True))
    assert log_of([], end)[-1]["response"]["error"] == {
        "code": sdk_code,
        "message": f"{code}: It broke.",
        "edgechat_code": code,
        "retryable": True,
    }


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.status)
def test_the_response_object_always_has_every_field(end: EndRecord) -> None:
    for event in log_of(MESSAGE, end):
        if "response" in event:
            assert set(event["response"]) == RESPONSE_FIELDS
            assert isinstance(event["response"]["created_at"], int)
            Response.model_validate(event["response"])


def test_usage_says_what_came_from_the_cache() -> None:
    assert log_of(MESSAGE)[-1]["response"]["usage"] == {
        "input_tokens": 11,
        "input_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 14,
    }


def test_the_ids_of_an_item_leave_out_its_terminator() -> None:
    said = [*REASONING, *MESSAGE, *CALL]
    items = output_items(RESPONSE, RELEASE, list(range(100, 100 + len(said))), said)
    assert items == [
        Item("reasoning", "assistant", "Let me see.", [100, 101], "m@0"),
        Item("message", "assistant", "Hello!", [103, 104, 105, 106], "m@0"),
        Item("function_call", "assistant", '{"q":"x"}', [108, 109, 110], "m@0", "look_up", "call_r1_abc_2"),
    ]


def test_the_header_that_was_generated_before_an_item_is_among_its_ids() -> None:
    said: Said = [
        [],
        [],
        [ItemStart("reasoning")],
        [Text("hm")],
        [ItemEnd()],
        [],
        [ItemStart("message"), Text("a")],
        [],
    ]
    items = output_items(RESPONSE, RELEASE, list(range(1, 9)), said)
    assert [(item.kind, item.ids) for item in items] == [("reasoning", [1, 2, 3, 4]), ("message", [6, 7, 8])]


def test_ids_after_the_last_item_belong_to_none() -> None:
    said: Said = [[ItemStart("message"), Text("a")], [ItemEnd()], [], []]
    assert [item.ids for item in output_items(RESPONSE, RELEASE, [1, 2, 3, 4], said)] == [[1]]


@given(said=SAID)
def test_an_id_that_says_something_belongs_to_one_item_unless_it_ends_one(said: Said) -> None:
    ids = list(range(len(said)))
    kept = [token for item in output_items(RESPONSE, RELEASE, ids, said) for token in item.ids or []]
    terminators = {token for token in ids if ItemEnd() in said[token]}
    saying = {token for token in ids if any(isinstance(delta, ItemStart | Text | Arguments) for delta in said[token])}
    assert kept == sorted(set(kept))
    assert terminators.isdisjoint(kept)
    assert saying - terminators <= set(kept)


def test_an_item_cut_off_by_the_limit_keeps_all_its_ids() -> None:
    (item,) = output_items(RESPONSE, RELEASE, [7, 8], [[ItemStart("message", "final_answer"), Text("a")], [Text("b")]])
    assert (item.text, item.ids, item.phase) == ("ab", [7, 8], "final_answer")


def test_text_outside_any_item_is_a_message_in_the_log_and_in_the_items() -> None:
    said: Said = [[Text("a")], [ItemEnd()], [Text("b")]]
    assert [_content(item) for item in log_of(said)[-1]["response"]["output"]] == ["a", "b"]
    assert [(item.text, item.ids) for item in output_items(RESPONSE, RELEASE, [1, 2, 3], said)] == [
        ("a", [1]),
        ("b", [3]),
    ]


@pytest.mark.parametrize(("kind", "id_"), [("message", "msg"), ("reasoning", "rs"), ("function_call", "fc")])
def test_item_ids_follow_from_the_response(kind: Literal["message", "reasoning", "function_call"], id_: str) -> None:
    assert item_id("resp_r1_abc", kind, 3) == f"{id_}_r1_abc_3"
    assert call_id("fc_r1_abc_3") == "call_r1_abc_3"


# -- log-probabilities ---------------------------------------------------------------------------

# What one id's text is held back for: the rest of a character, a stop string that did not come.
HELD_BACK: Said = [
    [ItemStart("message"), Logprobs(-0.1, [(1, -0.1)], b"\xc3", [b"\xc3"])],
    [Logprobs(-0.2, [(2, -0.2), (3, float("-inf"))], b"\xa9", [b"\xa9", b"!"]), Text("\u00e9")],
    [Logprobs(float("-inf"), [], b"EN")],
    [ItemEnd()],
]


def _tokens(event: dict[str, Any]) -> list[list[int]]:
    return [entry["bytes"] for entry in event["logprobs"]]


def test_log_probabilities_come_with_the_text_that_their_ids_complete() -> None:
    events = log_of(HELD_BACK, logprobs=True)
    (delta,) = (event for event in events if event["type"] == "response.output_text.delta")
    assert delta["logprobs"] == [
        {
            "token": "\ufffd",
            "bytes": [0xC3],
            "logprob": -0.1,
            "top_logprobs": [{"token": "\ufffd", "bytes": [0xC3], "logprob": -0.1}],
        },
        {
            "token": "\ufffd",
            "bytes": [0xA9],
            "logprob": -0.2,
            "top_logprobs": [
                {"token": "\ufffd", "bytes": [0xA9], "logprob": -0.2},
                {"token": "!", "bytes": [0x21], "logprob": -9999.0},
            ],
        },
    ]


def test_an_item_ends_with_the_log_probabilities_of_all_ids_that_are_part_of_its_text() -> None:
    said: Said = [*HELD_BACK[:3], [Text("EN")], [ItemEnd()]]
    events = {event["type"]: event for event in log_of(said, logprobs=True)}
    done = events["response.output_text.done"]
    assert _tokens(done) == [[0xC3], [0xA9], list(b"EN")]
    assert done["logprobs"][-1]["logprob"] == -9999.0
    part = events["response.content_part.done"]["part"]
    assert part == events["response.completed"]["response"]["output"][0]["content"][0]
    assert part["logprobs"] == done["logprobs"]
    assert events["response.content_part.added"]["part"]["logprobs"] == []


def _spoken(*ids: tuple[bytes, str]) -> Said:
    """A message of ids with their own bytes and the text that the node said when it had them."""
    deltas: Said = [[Logprobs(-0.1, [], own), *([Text(text)] if text else [])] for own, text in ids]
    return [[ItemStart("message"), *deltas[0]], *deltas[1:], [ItemEnd()]]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (_spoken((b"The", "The"), (b" fox", " "), (b" jumps", ""), (b" over", "")), [b"The", b" fox"]),
        (_spoken((b"The ", "The "), (b"fox", ""), (b" jumps", ""), (b" over", "")), [b"The "]),
        # "aab" ends it: the third "a" shows that the first is none of it, and the others still may be.
        (_spoken((b"a", ""), (b"a", ""), (b"a", "a"), (b"b", "")), [b"a"]),
        (_spoken((b"EN", ""), (b"vy", "ENvy"), (b"EN", ""), (b"D", "")), [b"EN", b"vy"]),
        # A leading space that is not said, and bytes that are no character, put nothing out of step.
        (_spoken((b" Hi", "Hi"), (b".", "."), (b"EN", ""), (b"D", "")), [b" Hi", b"."]),
        (_spoken((b"\xf0", ""), (b"!", "\ufffd!"), (b"EN", ""), (b"D", "")), [b"\xf0", b"!"]),
    ],
)
def test_a_stop_string_over_several_ids_has_no_log_probabilities(said: Said, told: list[bytes]) -> None:
    events = log_of(said, logprobs=True)
    deltas = [entry for event in events if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    (done,) = (event for event in events if event["type"] == "response.output_text.done")
    (item,) = events[-1]["response"]["output"]
    assert [bytes(entry["bytes"]) for entry in done["logprobs"]] == told
    assert deltas == done["logprobs"] == item["content"][0]["logprobs"]


@given(said=SAID, end=st.sampled_from(ENDS))
def test_nobody_gets_log_probabilities_unasked(said: Said, end: EndRecord) -> None:
    silent: Said = [[delta for delta in deltas if not isinstance(delta, Logprobs)] for deltas in said]
    assert log_of(said, end) == log_of(silent, end)


@given(said=SAID)
def test_an_item_ends_with_the_log_probabilities_that_its_deltas_told(said: Said) -> None:
    deltas: dict[str, list[list[int]]] = {}
    for event in log_of(said, logprobs=True):
        if event["type"] == "response.output_text.delta":
            deltas.setdefault(event["item_id"], []).extend(_tokens(event))
        if event["type"] == "response.output_text.done":
            assert deltas.get(event["item_id"], []) == _tokens(event)


def test_a_request_kept_before_it_had_all_its_fields_is_still_read() -> None:
    known = (
        "model",
        "input",
        "temperature",
        "top_p",
        "max_output_tokens",
        "top_logprobs",
        "text",
        "tools",
        "tool_choice",
        "reasoning",
    )
    kept = {name: value for name, value in msgspec.to_builtins(record().request).items() if name in known}
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(kept), type=Request)
    assert (read.min_p, read.repetition_penalty, read.logit_bias, read.logprobs) == (0.0, 1.0, [], False)
    assert (read.service_tier, read.exact, read.deadline_s) == ("default", False, 0.0)
