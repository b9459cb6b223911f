"""The event log of one response: a pure function of what is stored about it.

    log = StreamLog(record)
    log.open()                 response.created, response.in_progress
    log.extend(deltas)         output items, text and argument deltas
    log.close(end)             the open item's end, exactly one terminal event

`replay(record, deltas, end)` gives the same events byte for byte, because an event's content
and number depend on nothing else: not on frames, timing, the node or the epoch. Does not know how
events travel, nor what an id means (the node owns speech).

Event shapes: docs/PROTOCOL.md; field names: the openai SDK's `openai.types.responses`.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from core.conversation import Item
from core.frames import Arguments, Delta, ItemEnd, ItemStart, Logprobs, Text, Usage

Event: TypeAlias = dict[str, Any]
Status: TypeAlias = Literal["completed", "incomplete", "failed", "cancelled"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """The effective request: what the client asked for, defaults filled in; echoed in `response`.

    logprobs: whether messages come with them; top_logprobs: how many alternatives each names. exact: no speculation.
    deadline_s: from the request's arrival to its last id, 0 = none. tool_choice: "auto", "none" or `allowed_tools`.
    """

    model: str
    input: list[Item]
    temperature: float
    top_p: float
    max_output_tokens: int
    top_k: int = 0
    stop: list[str] = []
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    truncation: Literal["auto", "disabled"] = "disabled"
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] = msgspec.field(default_factory=lambda: {"format": {"type": "text"}})
    tools: list[dict[str, Any]] = []
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    max_tool_calls: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int = 0
    metadata: dict[str, str] = {}
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: list[tuple[int, float]] = []
    logprobs: bool = False
    service_tier: Literal["default", "flex"] = "default"
    exact: bool = False
    deadline_s: float = 0.0


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a response before its first id. created_at: unix seconds."""

    id: str
    tenant: str
    created_at: int
    seed: int
    release: str
    request: Request


class Failure(msgspec.Struct, frozen=True):
    """Why a response failed: one of our codes (core/errors) and a sentence. param: the field to blame, or ""."""

    code: str
    message: str
    retryable: bool
    param: str = ""


class EndRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a response ended. reason: of an incomplete one ("max_output_tokens"). completed_at: unix seconds."""

    status: Status
    completed_at: int
    reason: str | None = None
    error: Failure | None = None
    usage: Usage | None = None


class _OpenItem:
    """An output item that grows; `finished` turns into the JSON object of the SDK's models."""

    def __init__(self, start: ItemStart, item_id: str) -> None:
        self.start = start
        self.id = item_id
        self.pieces: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self._held: list[dict[str, Any]] = []
        self._unshown = b""

    def hold(self, logprob: dict[str, Any]) -> None:
        """Log-probabilities come before their id's text; they are told with it, or never."""
        self._held.append(logprob)
        self._unshown += bytes(logprob["bytes"])

    def shown_logprobs(self, text: str) -> list[dict[str, Any]]:
        """Those whose ids' text begins within the item's, now that `text` is part of it; told from here on.

        The rest may turn out to be a stop string. Text that no id spells (half a character) shows all ids so far.
        """
        if shown := text.encode("utf-8", "replace"):
            self._unshown = self._unshown.partition(shown)[2]
        count, behind = len(self._held), 0
        while count and (behind := behind + len(self._held[count - 1]["bytes"])) <= len(self._unshown):
            count -= 1
        told, self._held = self._held[:count], self._held[count:]
        self.logprobs += told
        return told

    def as_json(self, status: str) -> dict[str, Any]:
        text = "".join(self.pieces)
        match self.start.kind:
            case "message":
                content = [] if status == "in_progress" else [_text_part(text, self.logprobs)]
                item = {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}
                return item | ({"phase": self.start.phase} if self.start.phase else {})
            case "reasoning":
                content = [] if status == "in_progress" else [{"type": "reasoning_text", "text": text}]
                return {"id": self.id, "type": "reasoning", "status": status, "summary": [], "content": content}
            case "function_call":
                call = {"call_id": call_id(self.id), "name": self.start.name, "arguments": text}
                return {"id": self.id, "type": "function_call", "status": status} | call


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


# What the API's reference says of an id that is very unlikely; JSON has no infinities.
_LEAST_LOGPROB = -9999.0


def _logprob_json(said: Logprobs) -> dict[str, Any]:
    """The SDK's `response_output_text.Logprob`, which is also that of chat completions."""
    top = [_token_json(text, logprob) for (_, logprob), text in zip(said.top, said.top_texts, strict=False)]
    return _token_json(said.text, said.chosen) | {"top_logprobs": top}


def _token_json(text: bytes, logprob: float) -> dict[str, Any]:
    """An id is any bytes, half a character too: `bytes` has them as they are, `token` as far as they are text."""
    shown = logprob if logprob > _LEAST_LOGPROB else _LEAST_LOGPROB
    return {"token": text.decode("utf-8", "replace"), "bytes": list(text), "logprob": shown}


_PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class StreamLog:
    """Turns the deltas of ids into numbered client events.

    Invariant: `sequence_number` counts 0, 1, 2 ... over everything returned so far; after `close` nothing follows.
    """

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self._sequence_number = 0
        self._output: list[dict[str, Any]] = []
        self._item: _OpenItem | None = None
        self._end: EndRecord | None = None

    def open(self) -> list[Event]:
        """The first two events; both carry the response as it is before any output."""
        return [
            self._number({"type": "response.created", "response": self.response()}),
            self._number({"type": "response.in_progress", "response": self.response()}),
        ]

    def extend(self, deltas: list[list[Delta]]) -> list[Event]:
        """Events for further output ids; `deltas[i]` is what one of them made the model say."""
        events: list[Event] = []
        for said in deltas:
            for delta in said:
                events.extend(self._said(delta))
        return events

    def close(self, end: EndRecord) -> list[Event]:
        """End the open item, if any, and the response."""
        events = (
            [] if self._item is None else self._end_item("completed" if end.status == "completed" else "incomplete")
        )
        self._end = end
        name = {"completed": "completed", "failed": "failed"}.get(end.status, "incomplete")
        events.append(self._number({"type": f"response.{name}", "response": self.response()}))
        return events

    def response(self) -> dict[str, Any]:
        """The response object, every field of the SDK's model present."""
        record, request, end = self.record, self.record.request, self._end
        return {
            "id": record.id,
            "object": "response",
            "created_at": record.created_at,
            "completed_at": end.completed_at if end and end.status == "completed" else None,
            "status": end.status if end else "in_progress",
            "incomplete_details": {"reason": end.reason} if end and end.reason else None,
            "error": _error(end.error) if end and end.error else None,
            "model": request.model,
            "previous_response_id": request.previous_response_id,
            "instructions": request.instructions,
            "output": list(self._output),
            "tools": request.tools,
            "tool_choice": request.tool_choice,
            "parallel_tool_calls": request.parallel_tool_calls,
            "truncation": request.truncation,
            "text": request.text,
            "reasoning": request.reasoning or {"effort": None, "summary": None},
            "temperature": request.temperature,
            "top_p": request.top_p,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
            "top_logprobs": request.top_logprobs,
            "usage": usage_json(end.usage) if end and end.usage else None,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "store": request.store,
            "background": False,
            "service_tier": request.service_tier,
            "metadata": request.metadata,
            "safety_identifier": request.safety_identifier,
            "prompt_cache_key": request.prompt_cache_key,
            "user": request.user,
        }

    # -- one delta ------------------------------------------------------------------------

    def _said(self, delta: Delta) -> list[Event]:
        match delta:
            case ItemStart():
                ended = [] if self._item is None else self._end_item("completed")
                return ended + self._start_item(delta)
            case Text(text) | Arguments(text):
                # A node that speaks without opening an item still loses no text.
                opened = self._start_item(ItemStart("message")) if self._item is None else []
                return opened + self._grow(text)
            case ItemEnd():
                return [] if self._item is None else self._end_item("completed")
            case Logprobs():
                if self.record.request.logprobs and self._item is not None and self._item.start.kind == "message":
                    self._item.hold(_logprob_json(delta))
                return []

    def _start_item(self, start: ItemStart) -> list[Event]:
        index = len(self._output)
        item = _OpenItem(start, item_id(self.record.id, start.kind, index))
        self._item = item
        added = {"type": "response.output_item.added", "output_index": index, "item": item.as_json("in_progress")}
        events = [self._number(added)]
        if start.kind == "message":
            events.append(self._part_event("response.content_part.added", part=_text_part("", [])))
        return events

    def _grow(self, text: str) -> list[Event]:
        assert self._item is not None
        self._item.pieces.append(text)
        match self._item.start.kind:
            case "message":
                logprobs = self._item.shown_logprobs(text)
                return [self._part_event("response.output_text.delta", delta=text, logprobs=logprobs)]
            case "reasoning":
                shown = self.record.request.reasoning is not None
                return [self._part_event("response.reasoning_text.delta", delta=text)] if shown else []
            case "function_call":
                return [self._item_event("response.function_call_arguments.delta", delta=text)]

    def _end_item(self, status: str) -> list[Event]:
        assert self._item is not None
        item, index, events = self._item, len(self._output), []
        text = "".join(item.pieces)
        match item.start.kind:
            case "message":
                events.append(self._part_event("response.output_text.done", text=text, logprobs=list(item.logprobs)))
                part = _text_part(text, item.logprobs)
                events.append(self._part_event("response.content_part.done", part=part))
            case "reasoning":
                if self.record.request.reasoning is not None:
                    events.append(self._part_event("response.reasoning_text.done", text=text))
            case "function_call":
                done = {"name": item.start.name, "arguments": text}
                events.append(self._item_event("response.function_call_arguments.done", **done))
        self._output.append(item.as_json(status))
        self._item = None
        done_item = {"type": "response.output_item.done", "output_index": index, "item": self._output[-1]}
        return [*events, self._number(done_item)]

    def _item_event(self, type_: str, **fields: Any) -> Event:
        assert self._item is not None
        return self._number({"type": type_, "item_id": self._item.id, "output_index": len(self._output), **fields})

    def _part_event(self, type_: str, **fields: Any) -> Event:
        return self._item_event(type_, content_index=0, **fields)

    def _number(self, event: Event) -> Event:
        event["sequence_number"] = self._sequence_number
        self._sequence_number += 1
        return event


def replay(record: RequestRecord, deltas: list[list[Delta]], end: EndRecord | None) -> list[Event]:
    """The whole log again, from what is stored."""
    log = StreamLog(record)
    events = log.open() + log.extend(deltas)
    return events if end is None else events + log.close(end)


def item_id(response_id: str, kind: str, index: int) -> str:
    """Ids of output items follow from the response's, so that a replay gives the same."""
    return f"{_PREFIX[kind]}_{response_id.partition('_')[2]}_{index}"


def call_id(function_call_id: str) -> str:
    """What a `function_call_output` names to say which call it answers."""
    return "call_" + function_call_id.removeprefix("fc_")


def output_items(response_id: str, release: str, ids: list[int], deltas: list[list[Delta]]) -> list[Item]:
    """What was said, `deltas[i]` with `ids[i]`, as items of the conversation that goes on from here.

    An item's ids are all since the previous item's end: the header that the model wrote is among them, its
    terminator (the id that carries ItemEnd) is not. What comes after the last item belongs to none.
    """
    items: list[Item] = []
    start: ItemStart | None = None
    own: list[int] = []
    texts: list[str] = []

    def finish() -> None:
        if start is not None:
            call = call_id(item_id(response_id, start.kind, len(items))) if start.kind == "function_call" else ""
            items.append(Item(start.kind, "assistant", "".join(texts), own, release, start.name, call, start.phase))

    for token, said in zip(ids, deltas, strict=True):
        ended = False
        for delta in said:
            match delta:
                case ItemStart():
                    if start is not None:
                        finish()
                        own = []
                    start, texts = delta, []
                case Text(text) | Arguments(text):
                    if start is None:  # as in StreamLog: what is said without an item is a message
                        start, texts = ItemStart("message"), []
                    texts.append(text)
                case ItemEnd():
                    finish()
                    start, own, ended = None, [], True
                case Logprobs():
                    pass
        if not ended:
            own.append(token)
    finish()
    return items


def usage_json(usage: Usage) -> dict[str, Any]:
    """The SDK's `ResponseUsage`; KV-prefix hits are `cached_tokens`."""
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


_SDK_CODES = {
    "rate_limited": "rate_limit_exceeded",
    "overloaded": "rate_limit_exceeded",
    "context_length_exceeded": "invalid_prompt",
}


def _error(failure: Failure) -> dict[str, Any]:
    """`code` is a closed list in the SDK's types; ours opens the message and has its own field."""
    return {
        "code": _SDK_CODES.get(failure.code, "server_error"),
        "message": f"{failure.code}: {failure.message}",
        "edgechat_code": failure.code,
        "retryable": failure.retryable,
    }
