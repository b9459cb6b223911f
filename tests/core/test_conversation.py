from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.conversation import MAX_ITEMS, Item, parse_input, text_of
from core.errors import RequestError


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ("", [Item("message", "user", "")]),
        ("hi", [Item("message", "user", "hi")]),
        ([], []),
        ([{"role": "user", "content": "hi"}], [Item("message", "user", "hi")]),
        ([{"type": "message", "role": "developer", "content": "be brief"}], [Item("message", "developer", "be brief")]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
            [Item("message", "user", "ab")],
        ),
        (
            [
                {
                    "type": "message",
                    "id": "msg_1",
                    "status": "completed",
                    "role": "assistant",
                    "phase": "final_answer",
                    "content": [{"type": "output_text", "text": "x", "annotations": [], "logprobs": []}],
                }
            ],
            [Item("message", "assistant", "x", phase="final_answer")],
        ),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}],
            [Item("message", "assistant", "no")],
        ),
        ([{"role": "user", "content": []}], [Item("message", "user", "")]),
        ([{"type": "reasoning", "id": "rs_1", "summary": []}], [Item("reasoning", "assistant", "")]),
        (
            [{"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}],
            [Item("reasoning", "assistant", "hm")],
        ),
        (
            [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "unknown": 1}],
            [Item("function_call", "assistant", "{}", name="f", call_id="c")],
        ),
        (
            [{"type": "function_call_output", "call_id": "c", "output": "42"}],
            [Item("function_call_output", "tool", "42", call_id="c")],
        ),
        (
            [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "42"}]}],
            [Item("function_call_output", "tool", "42", call_id="c")],
        ),
    ],
)
def test_what_clients_send_becomes_items(value: object, items: list[Item]) -> None:
    assert parse_input(value) == items


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("value", "param", "words"),
    [
        (None, "input", "a string or a list of items"),
        (1, "input", "a string or a list of items"),
        ({"role": "user"}, "input", "a string or a list of items"),
        ([USER] * (MAX_ITEMS + 1), "input", f"at most {MAX_ITEMS}"),
        (["hi"], "input[0]", "must be an object"),
        ([USER, None], "input[1]", "must be an object"),
        ([{"content": "hi"}], "input[0].role", "must be one of assistant, developer, system, tool, user"),
        ([{"role": "root", "content": "hi"}], "input[0].role", "must be one of"),
        ([{"role": ["user"], "content": "hi"}], "input[0].role", "must be one of"),
        ([{"role": {}, "content": "hi"}], "input[0].role", "must be one of"),
        ([{"role": "user"}], "input[0].content", "a string or a list of parts"),
        ([{"role": "user", "content": 5}], "input[0].content", "a string or a list of parts"),
        ([{"role": "user", "content": ["x"]}], "input[0].content[0]", "a text part"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0]", "a text part"),
        ([{"role": "user", "content": [{"type": "input_text", "text": 1}]}], "input[0].content[0]", "a text part"),
        ([{"role": "user", "content": [{"type": ["input_text"], "text": ""}]}], "input[0].content[0]", "a text part"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], "input[0].content[0]", "takes text only"),
        ([{"type": "function_call", "call_id": "c", "name": "f"}], "input[0].arguments", "must be a string"),
        ([{"type": "function_call", "call_id": "c", "arguments": ""}], "input[0].name", "must be a string"),
        ([{"type": "function_call_output", "output": ""}], "input[0].call_id", "must be a string"),
        ([{"type": "function_call_output", "call_id": "c"}], "input[0].output", "a string or a list of parts"),
        ([{"type": "item_reference", "id": "x"}], "input[0]", "'item_reference', which is not an item type"),
        ([{"type": ["message"]}], "input[0]", "not an item type"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(value: object, param: str, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_input(value)
    assert refused.value.param == param
    assert words in refused.value.message
    assert f"`{param}" in refused.value.message
    assert refused.value.status == 400


def test_a_refusal_does_not_repeat_a_whole_request() -> None:
    with pytest.raises(RequestError) as refused:
        parse_input([{"type": "x" * 100_000}])
    assert len(refused.value.message) < 300


KEYS = ["type", "role", "content", "text", "output", "call_id", "name", "arguments", "refusal", "phase"]
WORDS = [
    "message",
    "function_call",
    "function_call_output",
    "reasoning",
    "user",
    "input_text",
    "refusal",
    "input_image",
]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=6,
)


@given(value=ANYTHING)
def test_any_json_is_items_or_a_refusal(value: object) -> None:
    try:
        assert all(isinstance(item, Item) for item in parse_input(value))
    except RequestError as error:
        assert error.param is not None and error.param.startswith("input")


def test_the_text_of_parts_is_their_concatenation() -> None:
    parts = [{"type": kind, "text": kind} for kind in ("input_text", "output_text", "text", "summary_text")]
    assert text_of(parts, "x") == "input_textoutput_texttextsummary_text"
