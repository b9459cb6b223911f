"""The chat completions dialect over HTTP, and the list of models."""

from __future__ import annotations

from aiohttp import web

from core.errors import EdgechatError
from core.stream import Event
from router.api.call import parse_json
from router.api.chat_completions import ChatCall, ChatStream, completion, own_names, parse_chat
from router.api.errors import from_failure, http_body
from router.api.models import model_list, one_model
from router.http import sse
from router.http.context import Context, context_of, principal
from router.http.middleware import body_of, json_response
from router.http.readers import Whole


async def create(request: web.Request) -> web.StreamResponse:
    try:
        return await _create(request)
    except EdgechatError as error:
        own_names(error)
        raise


async def _create(request: web.Request) -> web.StreamResponse:
    context, who = context_of(request), principal(request, "chat")
    chat = parse_chat(parse_json(await body_of(request)), context.config.defaults)
    if chat.call.stream:
        return await _stream(request, context, who.tenant, chat)
    reader = Whole()
    running = await context.dispatcher.begin(who.tenant, chat.call, reader)
    try:
        response = completion(await reader.response(), logprobs=chat.call.request.logprobs)
        return json_response(response, headers={"x-edge-node": reader.node})
    finally:
        context.sessions.leave(running, reader)


async def _stream(request: web.Request, context: Context, tenant: str, chat: ChatCall) -> web.StreamResponse:
    async with sse.outbox_for(context, request) as outbox:
        reader = sse.SseReader(outbox, _Translator(chat.include_usage))
        running = await context.dispatcher.begin(tenant, chat.call, reader)
        try:
            await reader.begin()
            return await sse.send(request, reader, outbox, lambda: _closing(reader))
        finally:
            context.sessions.leave(running, reader)


def _closing(reader: sse.SseReader) -> bytes:
    failure = reader.end.end.error if reader.end else reader.refused
    return sse.DONE if failure is None else sse.unnamed(http_body(own_names(from_failure(failure))))


class _Translator:
    """Events to bytes; learns the response's head from the first event."""

    def __init__(self, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._stream: ChatStream | None = None

    def __call__(self, event: Event) -> bytes:
        if self._stream is None:
            self._stream = ChatStream(event["response"], include_usage=self._include_usage)
        return b"".join(map(sse.unnamed, self._stream.on_event(event)))


async def models(request: web.Request) -> web.StreamResponse:
    context = context_of(request)
    principal(request, "chat")
    return json_response(model_list(context.fleet.models()))


async def model(request: web.Request) -> web.StreamResponse:
    context = context_of(request)
    principal(request, "chat")
    return json_response(one_model(request.match_info["model"], context.fleet.models()))
