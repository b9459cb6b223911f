"""JSON schemas as gpt-oss reads them; thousands more are compared with openai-harmony's in test_harmony_oracle."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_node.engine.speech.harmony_tools import MAX_DEPTH, lines_of, tools_section, type_of

WEATHER = {
    "type": "function",
    "name": "get_current_weather",
    "description": "Gets the current weather in the provided location.",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
        },
        "required": ["location"],
    },
}


def test_the_format_s_own_example() -> None:
    location = {"type": "function", "name": "get_location", "description": "Gets the location of the user."}
    assert tools_section([location, WEATHER]) == (
        "# Tools\n\n## functions\n\nnamespace functions {\n\n"
        "// Gets the location of the user.\ntype get_location = () => any;\n\n"
        "// Gets the current weather in the provided location.\ntype get_current_weather = (_: {\n"
        "// The city and state, e.g. San Francisco, CA\nlocation: string,\n"
        'format?: "celsius" | "fahrenheit", // default: celsius\n}) => any;\n\n} // namespace functions'
    )


@pytest.mark.parametrize(
    ("schema", "written"),
    [
        ({"type": "integer"}, "number"),
        ({"type": ["integer", "null"]}, "number | null"),
        ({"type": "array", "items": {"type": "string"}}, "string[]"),
        ({"type": "array"}, "Array<any>"),
        ({"anyOf": [{"type": "string"}]}, "any"),
        (True, "any"),
        ({"oneOf": [{"type": "string", "default": "a"}, {"type": "number"}]}, '\n | string // default: "a"\n | number'),
    ],
)
def test_types(schema: object, written: str) -> None:
    assert type_of(schema) == written


def test_lines_end_as_in_text_files() -> None:
    assert lines_of("a\r\nb\n\nc") == ["a", "b", "", "c"]
    assert lines_of("a\n") == ["a"]
    assert lines_of("") == []


def test_a_bottomless_schema_is_any_below_some_depth() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(5 * MAX_DEPTH):
        schema = {"type": "object", "properties": {"p": schema}}
    assert "p?: any," in type_of(schema)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYWORDS = "type properties required items enum oneOf description title default examples nullable name".split()
SCHEMAS = st.recursive(
    JSON | st.sampled_from(["object", "array", "string", "number"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=5),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*KEYWORDS, "parameters"]), SCHEMAS, max_size=6))
def test_what_is_no_schema_is_no_error(tool: dict[str, Any]) -> None:
    assert tools_section([tool | {"type": "function", "name": "f"}]).startswith("# Tools\n\n## functions\n\n")
    assert tools_section([tool | {"name": 5}]) == ""
