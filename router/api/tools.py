"""The functions that a request offers, and which of them the model is told of.

Nothing here can make a model call a function: what asks for that is narrowed to what can be done, and the answer
says so, or it is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from core.errors import RequestError
from router.api.call import read_fields

Tool: TypeAlias = dict[str, Any]


class Function(msgspec.Struct):
    """A function as the model is told of it, and as the answer echoes it: what the SDK's `FunctionTool` can hold."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def function_tools(tools: list[Tool], inside: str = "") -> list[Tool]:
    """The functions among the offered tools, every field present; hosted tools are not ours and left out.

    inside: where in a tool the client has written the function. Raises RequestError naming the tool and its field.
    """
    kept: dict[str, Tool] = {}
    for index, tool in enumerate(tools):
        if tool.get("type") != "function":
            continue
        where = f"tools[{index}]{inside}"
        function = read_fields(tool, Function, where)
        if function.name in kept:
            sentence = f"`{where}.name` is {function.name!r}, as another function's; give each its own name."
            raise RequestError(sentence, param=f"{where}.name")
        kept[function.name] = {"type": "function", **msgspec.structs.asdict(function)}
    return list(kept.values())


def effective_choice(asked: object, tools: list[Tool]) -> Any:
    """What becomes of `tool_choice` (Responses dialect): "auto", "none" or an `allowed_tools` with the mode "auto".

    A function that must be called becomes the only one that is offered. Raises RequestError for what would have to
    be enforced, and for functions that are not among `tools`.
    """
    match asked:
        case None | "auto":
            return "auto"
        case "none":
            return "none"
        case "required" | {"type": "allowed_tools", "mode": "required"}:
            sentence = '`tool_choice` cannot require a call here, the model decides; use "auto" or name one function.'
            raise RequestError(sentence, param="tool_choice")
        case {"type": "function", "name": str()}:
            return _allowed([asked], tools)
        case {"type": "allowed_tools", "mode": "auto", "tools": [*listed]}:
            return _allowed(listed, tools)
        case _:
            raise RequestError(
                '`tool_choice` must be "auto", "none", a function of `tools`, or `allowed_tools` with the mode "auto".',
                param="tool_choice",
            )


def _allowed(listed: list[Any], tools: list[Tool]) -> Tool:
    offered = {tool["name"] for tool in tools}
    names: list[str] = []
    for tool in listed:
        match tool:
            case {"type": "function", "name": str(name)} if name in offered:
                names.append(name)
            case {"type": str(kind)} if kind != "function":
                continue  # a hosted tool, which is not offered anyway
            case _:
                raise RequestError("`tool_choice` names a function that is not among `tools`.", param="tool_choice")
    return {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": name} for name in names]}


def flat_tool(tool: Tool) -> Tool:
    """Chat completions nest a function under `function`; the Responses dialect, and our nodes, do not."""
    function = tool.get("function")
    return {**function, "type": tool.get("type")} if isinstance(function, dict) else tool


def flat_choice(asked: object) -> object:
    """The `tool_choice` of chat completions as the Responses dialect has it."""
    match asked:
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [*listed]}}:
            tools = [flat_tool(tool) if isinstance(tool, dict) else tool for tool in listed]
            return {"type": "allowed_tools", "mode": mode, "tools": tools}
        case dict():
            return flat_tool(asked)
        case _:
            return asked
