"""The Responses dialect: the body of `POST /v1/responses` and the client events of its WebSocket mode.

Fields: the openai SDK's `types.responses`. Fields that are not known here are ignored. A known one that cannot be
honoured is refused, because silence would change what the client gets; but `max_tool_calls`, which counts hosted tools,
and `parallel_tool_calls` are taken and echoed only: whether to call twice is the model's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from core.conversation import parse_input
from core.errors import RequestError
from core.stream import Event, Request
from router.api.call import Call, effort, parse_json, read_fields
from router.api.fields import CommonFields, Count, common
from router.api.formats import Format, text_format
from router.api.tools import effective_choice, function_tools
from router.config import Defaults

# Every event of a lane carries its name.
LaneName: TypeAlias = Annotated[str, Meta(max_length=128)]
LOGPROBS = "message.output_text.logprobs"
Seed: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Reasoning(msgspec.Struct):
    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class Text(msgspec.Struct):
    format: Format | None = None


class _Body(CommonFields, kw_only=True):
    """`seed` is not OpenAI's here, but costs nothing and is asked for."""

    model: str
    input: Any
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    store: bool | None = None
    max_output_tokens: Count | None = None
    max_tool_calls: Count | None = None
    seed: Seed | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    reasoning: Reasoning | None = None
    text: Text | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    generate: bool | None = None
    stream_id: LaneName | None = None


class Create(msgspec.Struct, frozen=True):
    call: Call


class Cancel(msgspec.Struct, frozen=True):
    response_id: str


ClientEvent: TypeAlias = Create | Cancel


def parse_event(text: str, defaults: Defaults) -> ClientEvent:
    """A text frame of the WebSocket mode; raises RequestError saying what to send instead."""
    body = parse_json(text)
    match body.get("type"):
        case "response.create":
            return Create(parse_create(body, defaults))
        case "response.cancel":
            response_id = body.get("response_id")
            if not isinstance(response_id, str):
                raise RequestError("`response_id` is missing.", param="response_id")
            return Cancel(response_id)
        case None:
            raise RequestError("`type` is missing; send response.create or response.cancel.", param="type")
        case other:
            raise RequestError(
                f"The event type {other!r:.60} is not known; send response.create or response.cancel.", param="type"
            )


def stream_id_of(text: str) -> str | None:
    """The lane that a refused event belonged to, if it can be told."""
    try:
        named = parse_json(text).get("stream_id")
    except RequestError:
        return None
    return named[:128] if isinstance(named, str) else None


def parse_create(body: dict[str, Any], defaults: Defaults) -> Call:
    """A request to answer; raises RequestError naming the field that cannot be used."""
    fields = read_fields(body, _Body)
    _refuse_unservable(fields)
    tools = function_tools(fields.tools or [])
    request = Request(
        model=fields.model,
        input=parse_input(fields.input),
        instructions=fields.instructions,
        previous_response_id=fields.previous_response_id,
        store=fields.store is not False,
        max_output_tokens=fields.max_output_tokens or defaults.max_output_tokens,
        max_tool_calls=fields.max_tool_calls,
        truncation=fields.truncation or "disabled",
        reasoning=_reasoning(fields.reasoning),
        text={"format": text_format(fields.text.format if fields.text else None, "text.format")},
        tools=tools,
        tool_choice=effective_choice(fields.tool_choice, tools),
        parallel_tool_calls=fields.parallel_tool_calls is not False,
        metadata=fields.metadata or {},
        safety_identifier=fields.safety_identifier,
        prompt_cache_key=fields.prompt_cache_key,
        user=fields.user,
        logprobs=bool(fields.top_logprobs) or LOGPROBS in (fields.include or []),
        **common(fields, defaults, seeded=fields.seed is not None),
    )
    return Call(
        request=request,
        stream=bool(fields.stream),
        generate=fields.generate is not False,
        seed=fields.seed,
        stream_id=fields.stream_id,
    )


def _refuse_unservable(fields: _Body) -> None:
    if fields.background:
        raise RequestError("`background` is not served here; stream the answer, or wait for it.", param="background")
    if fields.conversation is not None:
        raise RequestError(
            "`conversation` is not served here; continue with `previous_response_id`.", param="conversation"
        )
    if fields.prompt is not None:
        raise RequestError("`prompt` templates are not served here; send the text as `input`.", param="prompt")


def _reasoning(asked: Reasoning | None) -> dict[str, Any] | None:
    return None if asked is None else {"effort": effort(asked.effort, "reasoning.effort"), "summary": asked.summary}


def on_lane(event: Event, stream_id: str | None) -> Event:
    """Events of a response that was asked for on a lane name it; the log itself does not know lanes."""
    return event if stream_id is None else event | {"stream_id": stream_id}


def deleted(response_id: str) -> dict[str, Any]:
    """The answer to `DELETE /v1/responses/{id}`."""
    return {"id": response_id, "object": "response", "deleted": True}


def node_event(response_id: str, node: str, region: str, stream_id: str | None) -> Event:
    """Extension: which node answers from now on."""
    return on_lane({"type": "edgechat:node", "response_id": response_id, "node": node, "region": region}, stream_id)


def progress_event(response_id: str, computed: int, total: int, stream_id: str | None) -> Event:
    """Extension: how much of the prompt has been read, in tokens."""
    event = {"type": "edgechat:progress", "response_id": response_id, "computed": computed, "total": total}
    return on_lane(event, stream_id)
