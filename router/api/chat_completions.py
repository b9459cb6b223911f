"""The chat completions dialect: `POST /v1/chat/completions`, whole and as chunks.

Fields: the openai SDK's `types.chat`. Never stored. Reads the response's own events, so that both
dialects say the same.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from core.conversation import MAX_ITEMS, Item, text_of
from core.errors import EdgechatError, RequestError
from core.stream import Event, Request
from router.api.call import Call, effort, output_text, read_fields, text_parts
from router.api.fields import CommonFields, Count, common
from router.api.formats import ChatFormat, text_format
from router.api.tools import effective_choice, flat_choice, flat_tool, function_tools
from router.config import Defaults

Chunk: TypeAlias = dict[str, Any]
_ROLES = ("assistant", "developer", "system", "tool", "user")
_OWN_NAMES = {"text.format": "response_format", "input": "messages"}


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Function(msgspec.Struct):
    name: str
    arguments: str = ""


class _ToolCall(msgspec.Struct):
    id: str
    function: _Function


class _Message(msgspec.Struct):
    role: str
    content: Any = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None


class _Body(CommonFields, kw_only=True):
    model: str
    messages: list[_Message]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: int | None = None
    seed: int | None = None
    logprobs: bool | None = None
    response_format: ChatFormat | None = None
    reasoning_effort: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    user: str | None = None


class ChatCall(msgspec.Struct, frozen=True):
    call: Call
    include_usage: bool


def parse_chat(body: dict[str, Any], defaults: Defaults) -> ChatCall:
    """A chat completion to answer; raises RequestError naming the field that cannot be used."""
    fields = read_fields(body, _Body)
    _refuse_unservable(fields)
    tools = function_tools([flat_tool(tool) for tool in fields.tools or []], ".function")
    limit = fields.max_completion_tokens or fields.max_tokens or defaults.max_output_tokens
    request = Request(
        model=fields.model,
        input=_items(fields.messages),
        store=False,
        max_output_tokens=limit,
        # Asked for always: the chunks carry it, and a model that does not reason sends none.
        reasoning={"effort": effort(fields.reasoning_effort, "reasoning_effort"), "summary": None},
        text={"format": text_format(fields.response_format, "response_format")},
        tools=tools,
        tool_choice=effective_choice(flat_choice(fields.tool_choice), tools),
        user=fields.user,
        logprobs=bool(fields.logprobs),
        **common(fields, defaults, seeded=fields.seed is not None),
    )
    # Any integer is a seed in this dialect; the engine's has 63 bits.
    seed = None if fields.seed is None else fields.seed % 2**63
    call = Call(request=request, prefix="chatcmpl", stream=bool(fields.stream), seed=seed)
    return ChatCall(call, bool(fields.stream_options and fields.stream_options.include_usage))


def _refuse_unservable(fields: _Body) -> None:
    if fields.n not in (None, 1):
        raise RequestError(f"`n` is {fields.n}; one choice a request is served, send several requests.", param="n")
    if fields.top_logprobs and not fields.logprobs:
        raise RequestError("`top_logprobs` goes with `logprobs`: set that to true as well.", param="top_logprobs")
    if not fields.messages:
        raise RequestError("`messages` is empty; send at least one.", param="messages")
    if len(fields.messages) > MAX_ITEMS:
        raise RequestError(f"`messages` has {len(fields.messages)}, at most {MAX_ITEMS} are taken.", param="messages")


def _items(messages: list[_Message]) -> list[Item]:
    return [item for index, message in enumerate(messages) for item in _said(message, f"messages[{index}]")]


def _said(message: _Message, where: str) -> list[Item]:
    if message.role not in _ROLES:
        raise RequestError(f"`{where}.role` must be one of {', '.join(_ROLES)}.", param=f"{where}.role")
    if message.role == "tool":
        output = text_of(message.content, where)
        return [Item("function_call_output", "tool", output, call_id=message.tool_call_id or "")]
    calls = [
        Item("function_call", "assistant", call.function.arguments, name=call.function.name, call_id=call.id)
        for call in message.tool_calls or []
    ]
    content = message.content
    if content is None and message.role == "assistant":
        if calls:
            return list(calls)
        content = ""  # what SDKs send back of an answer that said nothing
    return [Item("message", message.role, text_of(content, where)), *calls]


def own_names(error: EdgechatError) -> EdgechatError:
    """The same error; a field that it names as the Responses dialect does, as a node does, is called as it was sent."""
    for theirs, own in _OWN_NAMES.items():
        if error.param == theirs:
            error.param = own
            error.message = error.message.replace(f"`{theirs}`", f"`{own}`")
    return error


def completion(response: dict[str, Any], *, logprobs: bool = False) -> dict[str, Any]:
    """A finished response object as one `chat.completion`; logprobs: whether they were asked for."""
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    message: dict[str, Any] = {"role": "assistant", "content": output_text(response), "refusal": None}
    thought = "".join(
        part["text"] for item in response["output"] if item["type"] == "reasoning" for part in item["content"]
    )
    if thought:
        message |= {"reasoning": thought, "reasoning_content": thought}
    if calls:
        message["tool_calls"] = [_tool_call(call) for call in calls]
        message["content"] = message["content"] or None
    told = [entry for part in text_parts(response) for entry in part["logprobs"]]
    choice = {"index": 0, "message": message, "logprobs": _logprobs(told) if logprobs else None}
    choice["finish_reason"] = finish_reason(response)
    return _head(response, "chat.completion") | {"choices": [choice], "usage": usage(response)}


def finish_reason(response: dict[str, Any]) -> Literal["stop", "length", "tool_calls"]:
    if response["incomplete_details"] is not None:
        return "length"
    return "tool_calls" if any(item["type"] == "function_call" for item in response["output"]) else "stop"


def usage(response: dict[str, Any]) -> dict[str, Any] | None:
    """The `usage` of a finished response under this dialect's names."""
    used = response["usage"]
    if used is None:
        return None
    return {
        "prompt_tokens": used["input_tokens"],
        "completion_tokens": used["output_tokens"],
        "total_tokens": used["total_tokens"],
        "prompt_tokens_details": {"cached_tokens": used["input_tokens_details"]["cached_tokens"]},
        "completion_tokens_details": {"reasoning_tokens": used["output_tokens_details"]["reasoning_tokens"]},
    }


def _tool_call(item: dict[str, Any]) -> dict[str, Any]:
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def _logprobs(content: list[dict[str, Any]]) -> dict[str, Any]:
    """The SDK's `ChoiceLogprobs`; its entries are those of the response's own text."""
    return {"content": content, "refusal": None}


def _head(response: dict[str, Any], kind: str) -> dict[str, Any]:
    head = {"id": response["id"], "object": kind, "created": response["created_at"], "model": response["model"]}
    return head | {"service_tier": response["service_tier"]}


class ChatStream:
    """Turns the events of one response into chunks; `response` is the object of its first event.

    The first chunk waits for the first thing said, so that a refusal by the node can still be an HTTP error.
    """

    def __init__(self, response: dict[str, Any], *, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._calls = 0
        self._begun = False
        self._base: Chunk = _head(response, "chat.completion.chunk")

    def on_event(self, event: Event) -> list[Chunk]:
        match event["type"]:
            case "response.output_text.delta":
                return self._delta({"content": event["delta"]}, logprobs=event["logprobs"])
            case "response.reasoning_text.delta":
                return self._delta({"reasoning": event["delta"], "reasoning_content": event["delta"]})
            case "response.output_item.added" if event["item"]["type"] == "function_call":
                self._calls += 1
                return self._delta({"tool_calls": [{"index": self._calls - 1, **_tool_call(event["item"])}]})
            case "response.function_call_arguments.delta":
                piece = {"index": self._calls - 1, "function": {"arguments": event["delta"]}}
                return self._delta({"tool_calls": [piece]})
            case "response.completed" | "response.incomplete":
                return self._end(event["response"])
            case _:
                return []

    def _delta(
        self, delta: dict[str, Any], finish: str | None = None, logprobs: list[dict[str, Any]] | None = None
    ) -> list[Chunk]:
        opening = [] if self._begun else [self._chunk({"role": "assistant", "content": ""})]
        self._begun = True
        return [*opening, self._chunk(delta, finish, logprobs)]

    def _end(self, response: dict[str, Any]) -> list[Chunk]:
        chunks = self._delta({}, finish_reason(response))
        if self._include_usage:
            chunks.append(self._base | {"choices": [], "usage": usage(response)})
        return chunks

    def _chunk(
        self, delta: dict[str, Any], finish: str | None = None, logprobs: list[dict[str, Any]] | None = None
    ) -> Chunk:
        told = _logprobs(logprobs) if logprobs else None
        choice = {"index": 0, "delta": delta, "logprobs": told, "finish_reason": finish}
        return self._base | {"choices": [choice]} | ({"usage": None} if self._include_usage else {})
