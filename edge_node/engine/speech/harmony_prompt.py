"""The two messages that open a gpt-oss prompt: who the model is, and what the developer wants of it.

The system message is openai-harmony's, without its line `Current date`: a prompt is a pure function of the
request, so that a stream can move to another node, and tomorrow's second turn finds today's first in the cache.
Whoever wants the model to know the date says it in the instructions. Does not know ids nor the conversation.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from edge_node.engine.speech.harmony_format import CHANNELS
from edge_node.engine.speech.harmony_tools import functions, lines_of, tools_section
from edge_node.engine.speech.setting import Setting

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"

_CHANNELS = f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
_CALLS = "Calls to these tools must go to the commentary channel: 'functions'."


def effort_of(asked: str) -> Literal["low", "medium", "high"]:
    """gpt-oss knows three efforts; "" and what nobody defined mean its usual one."""
    match asked:
        case "none" | "minimal" | "low":
            return "low"
        case "high" | "xhigh":
            return "high"
        case _:
            return "medium"


def system_text(setting: Setting) -> str:
    """Identity, knowledge cutoff, effort, channels, and where calls go when functions are offered."""
    about = f"{IDENTITY}\nKnowledge cutoff: {KNOWLEDGE_CUTOFF}"
    channels = f"{_CHANNELS}\n{_CALLS}" if functions(setting.tools) else _CHANNELS
    return f"{about}\n\nReasoning: {effort_of(setting.effort)}\n\n{channels}"


def developer_text(instructions: list[str], setting: Setting) -> str:
    """Instructions, functions and the answer's format, each if there is any; empty when nothing is asked."""
    told = "\n\n".join(instructions)
    sections = [instructions_section(told) if instructions else "", tools_section(setting.tools)]
    return "\n\n".join(section for section in [*sections, _format_section(setting.format)] if section)


def instructions_section(text: str) -> str:
    """What stands in a developer message that only instructs."""
    return f"# Instructions\n\n{text}"


def _format_section(asked: dict[str, Any] | None) -> str:
    """`# Response Formats` for a JSON format. The text alone holds the model to nothing: that needs a grammar."""
    match asked:
        case {"type": "json_schema", "schema": dict() as schema, **more}:
            name, description = _text(more.get("name")) or "response", _text(more.get("description"))
        case {"type": "json_object"}:
            name, description, schema = "json_object", "", {"type": "object"}
        case _:
            return ""
    described = [f"// {line}" for line in lines_of(description)]
    return "\n".join(["# Response Formats\n", f"## {name}\n", *described, msgspec.json.encode(schema).decode()])


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
