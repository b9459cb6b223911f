from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.conversation import MAX_ITEMS, Item, Kind, parse_input, prefix_keys, text_of
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


# -- prefix keys -------------------------------------------------------------------------------

FIELDS = ["kind", "role", "text", "name", "call_id", "phase"]
KINDS: st.SearchStrategy[Kind] = st.sampled_from(["message", "reasoning", "function_call", "function_call_output"])
LETTERS = st.text("ab\ud800", max_size=2)
ITEMS = st.lists(st.builds(Item, KINDS, LETTERS, LETTERS, name=LETTERS, call_id=LETTERS, phase=LETTERS), max_size=4)


def said(item: Item) -> list[str]:
    return [getattr(item, field) for field in FIELDS]


@given(one=ITEMS, other=ITEMS)
def test_two_conversations_have_the_same_prefix_keys_exactly_as_far_as_they_say_the_same(
    one: list[Item], other: list[Item]
) -> None:
    keys, others = prefix_keys(one, "tiny@1", "salt"), prefix_keys(other, "tiny@1", "salt")
    assert len(set(keys)) == len(one)
    common = 0
    while common < min(len(one), len(other)) and said(one[common]) == said(other[common]):
        common += 1
    assert keys[:common] == others[:common]
    assert not set(keys[common:]) & set(others[common:])


@pytest.mark.parametrize("field", FIELDS)
def test_a_prefix_key_depends_on_each_thing_that_an_item_says(field: str) -> None:
    item = Item("message", "user", "hi")
    changed = msgspec.structs.replace(item, **{field: "reasoning"})
    first, *later = prefix_keys([item, item], "tiny@1", "salt")
    other, *others = prefix_keys([changed, item], "tiny@1", "salt")
    assert first != other and later != others


def test_an_item_generated_here_and_sent_back_by_its_client_have_the_same_prefix_key() -> None:
    ours, theirs = Item("message", "assistant", "hi", [1, 2], "tiny@1"), Item("message", "assistant", "hi")
    assert prefix_keys([ours], "tiny@1", "salt") == prefix_keys([theirs], "tiny@1", "salt")


def test_another_release_or_salt_shares_no_prefix_key() -> None:
    items = [Item("message", "user", "hi")] * 3
    keys = [prefix_keys(items, release, salt) for release in ("tiny@1", "tiny@2") for salt in ("", "a", "b" * 100)]
    assert len({key for one in keys for key in one}) == 6 * 3
