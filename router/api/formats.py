"""The formats that an answer can be held to, as either dialect writes them.

Whether a schema can be enforced is for the node to say, which has the grammar.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from core.errors import RequestError
from core.limits import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH


class Schema(msgspec.Struct):
    """A named JSON schema. strict: kept for the echo; an answer is held to its schema either way."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class PlainText(msgspec.Struct, tag_field="type", tag="text"):
    """Any text."""


class JsonObject(msgspec.Struct, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchema(Schema, tag_field="type", tag="json_schema"):
    """As the Responses dialect has it in `text.format`."""


class NestedJsonSchema(msgspec.Struct, tag_field="type", tag="json_schema"):
    """As chat completions have it in `response_format`."""

    json_schema: Schema


Format: TypeAlias = PlainText | JsonObject | JsonSchema
ChatFormat: TypeAlias = PlainText | JsonObject | NestedJsonSchema


def text_format(asked: Format | ChatFormat | None, where: str) -> dict[str, Any]:
    """The Responses API's `text.format`; raises RequestError naming the field `where`."""
    match asked:
        case None | PlainText():
            return {"type": "text"}
        case JsonObject():
            return {"type": "json_object"}
        case JsonSchema():
            return _described(asked, where)
        case NestedJsonSchema(schema):
            return _described(schema, f"{where}.json_schema")


def _described(asked: Schema, where: str) -> dict[str, Any]:
    if len(msgspec.json.encode(asked.schema)) > MAX_SCHEMA_BYTES:
        raise RequestError(
            f"`{where}.schema` has more than {MAX_SCHEMA_BYTES} bytes; send a smaller one.", param=f"{where}.schema"
        )
    if _deeper(asked.schema, MAX_SCHEMA_DEPTH):
        raise RequestError(
            f"`{where}.schema` is nested more than {MAX_SCHEMA_DEPTH} deep; use `$defs`.", param=f"{where}.schema"
        )
    described = {"name": asked.name, "description": asked.description, "schema": asked.schema, "strict": asked.strict}
    return {"type": "json_schema", **described}


def _deeper(schema: dict[str, Any], most: int) -> bool:
    """Whether objects and lists are nested more than `most` deep."""
    level: list[Any] = [schema]
    for _ in range(most):
        inside = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in inside if isinstance(inner, dict | list)]
    return bool(level)
