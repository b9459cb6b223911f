"""Whatever JSON a client sends, a translator takes it or refuses it in its own words."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from core.errors import RequestError
from router.api.chat_completions import _Body as ChatBody
from router.api.chat_completions import parse_chat
from router.api.responses import _Body as ResponsesBody
from router.api.responses import parse_create, parse_event
from router.api.shim import parse_message
from router.config import Defaults

DEFAULTS = Defaults()
_words = st.sampled_from(
    [
        "type",
        "role",
        "content",
        "text",
        "message",
        "function",
        "function_call",
        "reasoning",
        "user",
        "input_text",
        "name",
        "schema",
        "json_schema",
        "allowed_tools",
        "mode",
        "auto",
        "tools",
    ]
)
_json: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), _words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_words, inner, max_size=4)),
    max_leaves=8,
)


def _body(kind: Any, required: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        required, optional={name: _json for name in kind.__struct_encode_fields__ if name not in required}
    )


@given(_body(ResponsesBody, {"model": st.just("tiny"), "input": _json}))
@example({"model": "tiny", "input": [{"role": {}, "content": "x"}]})
@example({"model": "tiny", "input": [{"role": "user", "content": [{"type": []}]}]})
@example({"model": "tiny", "input": [{"type": []}]})
@example({"model": "tiny", "input": "x", "tool_choice": [], "tools": [{"type": [], "name": 1}]})
@example({"model": "tiny", "input": "x", "text": {"format": {"type": []}}})
@example({"model": "tiny", "input": "x", "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [[]]}})
@example({"model": "tiny", "input": "x", "logit_bias": {"\u0663": 1}})
def test_any_body_of_a_response_is_taken_or_refused(body: dict[str, Any]) -> None:
    for call in (
        lambda: parse_create(body, DEFAULTS),
        lambda: parse_event(json.dumps(body | {"type": "response.create"}), DEFAULTS),
    ):
        try:
            call()
        except RequestError as error:
            assert "\n" not in error.message


@given(_body(ChatBody, {"model": st.just("tiny"), "messages": st.lists(_json, max_size=3)}))
@example({"model": "tiny", "messages": [{"role": "user", "content": [{"type": {}}]}]})
@example({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "response_format": {"type": []}})
@example({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": 10**30})
def test_any_body_of_a_chat_is_taken_or_refused(body: dict[str, Any]) -> None:
    try:
        parse_chat(body, DEFAULTS)
    except RequestError as error:
        assert "\n" not in error.message


@given(_json)
def test_any_plain_message_is_taken_or_refused(value: Any) -> None:
    for text in (json.dumps(value), json.dumps({"text": value, "model": value})):
        try:
            parse_message(text, [], "tiny", DEFAULTS)
        except RequestError as error:
            assert error.message
