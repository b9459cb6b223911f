"""Function tools as gpt-oss reads them: a TypeScript-like namespace, made of JSON schemas.

Written exactly as openai-harmony 0.0.8 does, its peculiarities included (an object's description stands both
above the property and inside it), because the model was trained on this text. Schemas come from clients: what is
not as JSON schema says is left out or `any`, never an error. Does not know ids.
"""

from __future__ import annotations

from typing import Any

import msgspec

MAX_DEPTH = 64
"""Deeper schemas are `any` below this; JSON readers stop near there too (two levels of JSON a level of schema)."""


def functions(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The functions with a name among the tools; hosted tools of any kind are not ours and left out."""
    return [tool for tool in tools if tool.get("type") == "function" and _text(tool, "name")]


def tools_section(tools: list[dict[str, Any]]) -> str:
    """`# Tools` with every function of `tools`; empty when there is none."""
    offered = functions(tools)
    if not offered:
        return ""
    lines = ["# Tools\n", "## functions\n", "namespace functions {\n"]
    for tool in offered:
        lines += [f"// {line}" for line in lines_of(_text(tool, "description"))]
        lines.append(f"type {tool['name']} = {_signature(tool.get('parameters'))} => any;\n")
    return "\n".join([*lines, "} // namespace functions"])


def lines_of(text: str) -> list[str]:
    """Lines as they end in text files: LF or CR LF, the last may lack it."""
    *ended, rest = text.split("\n")
    return [line.removesuffix("\r") for line in ended] + ([rest] if rest else [])


def _signature(parameters: object) -> str:
    return "()" if parameters is None else f"(_: {type_of(parameters)})"


def type_of(schema: object, indent: str = "", depth: int = 0) -> str:
    """The type that a JSON schema describes; further lines begin with `indent`."""
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return "any"
    variants = schema.get("oneOf")
    if isinstance(variants, list):
        return "".join(f"\n{indent} | {_variant(variant, indent, depth)}" for variant in variants)
    match schema.get("type"):
        case list() as kinds if names := [kind for kind in kinds if isinstance(kind, str)]:
            return " | ".join("number" if name == "integer" else name for name in names)
        case "object":
            return _object(schema, indent, depth)
        case "string":
            return " | ".join(f'"{value}"' for value in _list(schema, "enum") if isinstance(value, str)) or "string"
        case "number" | "integer":
            return "number"
        case "boolean":
            return "boolean"
        case "array":
            return type_of(schema["items"], indent, depth + 1) + "[]" if "items" in schema else "Array<any>"
        case _:
            return "any"


def _object(schema: dict[str, Any], indent: str, depth: int) -> str:
    lines = [f"{indent}// {description}\n" for description in _described(schema, "description")]
    lines.append("{\n")
    required = {name for name in _list(schema, "required") if isinstance(name, str)}
    for name, value in _fields(schema.get("properties")).items():
        mark = "" if name in required else "?"
        lines += _comments_above(_fields(value), indent)
        lines.append(_property(f"{indent}{name}{mark}:", value, indent, depth))
    return "".join(lines) + f"{indent}}}"


def _comments_above(value: dict[str, Any], indent: str) -> list[str]:
    lines = [f"{indent}// {title}\n{indent}//\n" for title in _described(value, "title")]
    if "oneOf" not in value:
        lines += [f"{indent}// {description}\n" for description in _described(value, "description")]
    if examples := _list(value, "examples"):
        lines.append(f"{indent}// Examples:\n")
        lines += [f'{indent}// - "{example}"\n' for example in examples if isinstance(example, str)]
    return lines


def _property(name: str, schema: object, indent: str, depth: int) -> str:
    value = _fields(schema)
    if isinstance(value.get("oneOf"), list):
        return _choice(name, value, indent, depth)
    kind = _nullable(value, type_of(schema, f"{indent}    ", depth + 1))
    default = f" // {_default(value)}" if "default" in value and "oneOf" not in value else ""
    return f"{name} {kind},{default}\n"


def _choice(name: str, value: dict[str, Any], indent: str, depth: int) -> str:
    """A property that is one of several things: a line each."""
    variants: list[object] = value["oneOf"]
    own = _described(value, "description")
    first = _described(_fields(variants[0]), "description") if variants else []
    shown = own if own != first else []
    lines = [f"{indent}// {description}\n" for description in shown]
    if "default" in value:
        lines.append(f"{indent}// {_default(value)}\n")
    lines.append(f"{name}\n")
    for index, variant in enumerate(variants):
        fields = _fields(variant)
        described = [] if index == 0 and shown else _described(fields, "description")
        comments = described if described != own else []
        comments = comments + ([_default(fields)] if "default" in fields else [])
        kind = _nullable(fields, type_of(variant, f"{indent}   ", depth + 1))
        lines.append(f"{indent} | {kind}{_trailing(comments)}\n")
    return "".join([*lines, f"{indent},\n"])


def _variant(variant: object, indent: str, depth: int) -> str:
    """One of several things that are no property's: a default that is one of an enum's is quoted here."""
    fields = _fields(variant)
    comments = _described(fields, "description")
    if "default" in fields:
        enumerated = isinstance(fields["default"], str) and _list(fields, "enum")
        comments = [*comments, f"default: {_json(fields['default'])}" if enumerated else _default(fields)]
    return _nullable(fields, type_of(variant, f"{indent}   ", depth + 1)) + _trailing(comments)


def _trailing(comments: list[str]) -> str:
    return f" // {' '.join(comments)}" if comments else ""


def _nullable(fields: dict[str, Any], kind: str) -> str:
    return f"{kind} | null" if fields.get("nullable") is True and "null" not in kind else kind


def _default(fields: dict[str, Any]) -> str:
    default = fields["default"]
    if not isinstance(default, str):
        return f"default: {_json(default)}"
    return f"default: {default}" if _list(fields, "enum") else f'default: "{default}"'


def _list(fields: dict[str, Any], key: str) -> list[object]:
    value = fields.get(key)
    return value if isinstance(value, list) else []


def _described(fields: dict[str, Any], key: str) -> list[str]:
    """The text under `key`, if there is one, as a list of at most one: an empty text is a text."""
    value = fields.get(key)
    return [value] if isinstance(value, str) else []


def _fields(schema: object) -> dict[str, Any]:
    return schema if isinstance(schema, dict) else {}


def _text(fields: dict[str, Any], key: str) -> str:
    value = fields.get(key)
    return value if isinstance(value, str) else ""


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
