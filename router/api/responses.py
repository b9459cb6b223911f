"""The Responses dialect: the body of `POST /v1/responses`, the query of a retrieval, the WebSocket's client events.

Fields: the openai SDK's `types.responses`. Fields that are not known here are ignored. A known one that cannot be
honoured is refused, because silence would change what the client gets; but `max_tool_calls`, which counts hosted tools,
and `parallel_tool_calls` are taken and echoed only: whether to call twice is the model's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

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
MAX_SEQUENCE_NUMBER = 2**53 - 1
"""What every JSON reader can hold."""
_NUMBER = re.compile(r"[0-9]{1,16}")
_TYPES = "send response.create, response.cancel or edgechat:resume"
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


class Resume(msgspec.Struct, frozen=True):
    """Go on with a response after the event `starting_after`; -1 = from its first."""

    response_id: str
    starting_after: int = -1
    stream_id: str | None = None


ClientEvent: TypeAlias = Create | Cancel | Resume


class _ResumeBody(msgspec.Struct):
    response_id: str
    starting_after: Annotated[int, Meta(ge=0, le=MAX_SEQUENCE_NUMBER)] | None = None
    stream_id: LaneName | None = None


class Retrieve(NamedTuple):
    """What `GET /v1/responses/{id}` asks for; starting_after: as in `Resume`, for a stream."""

    stream: bool = False
    starting_after: int = -1


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
        case "edgechat:resume":
            return _resume(read_fields(body, _ResumeBody))
        case None:
            raise RequestError(f"`type` is missing; {_TYPES}.", param="type")
        case other:
            raise RequestError(f"The event type {other!r:.60} is not known; {_TYPES}.", param="type")


def _resume(fields: _ResumeBody) -> Resume:
    starting_after = -1 if fields.starting_after is None else fields.starting_after
    return Resume(fields.response_id, starting_after, fields.stream_id)


def parse_retrieve(query: Mapping[str, str]) -> Retrieve:
    """The query of a GET; raises RequestError naming the field. `include` and other fields are ignored."""
    stream = query.get("stream", "false").lower()
    if stream not in {"true", "false"}:
        raise RequestError(f"`stream` is {stream!r:.60}; send true or false.", param="stream")
    after = query.get("starting_after")
    if after is None:
        return Retrieve(stream == "true")
    if not _NUMBER.fullmatch(after) or int(after) > MAX_SEQUENCE_NUMBER:
        sentence = f"`starting_after` is {after!r:.60}; send the `sequence_number` of the last event that you have."
        raise RequestError(sentence, param="starting_after")
    return Retrieve(stream == "true", int(after))


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


def deletion(response_id: str) -> dict[str, Any]:
    """The answer to `DELETE /v1/responses/{id}`."""
    return {"id": response_id, "object": "response", "deleted": True}


def node_event(response_id: str, node: str, region: str, stream_id: str | None) -> Event:
    """Extension: which node answers from now on."""
    return on_lane({"type": "edgechat:node", "response_id": response_id, "node": node, "region": region}, stream_id)


def progress_event(response_id: str, computed: int, total: int, stream_id: str | None) -> Event:
    """Extension: how much of the prompt has been read, in tokens."""
    event = {"type": "edgechat:progress", "response_id": response_id, "computed": computed, "total": total}
    return on_lane(event, stream_id)
