"""The Responses dialect over plain HTTP: create, retrieve, delete, cancel."""

from __future__ import annotations

from aiohttp import web

from core.errors import NotImplementedYet, ResponseNotFound
from router.api.call import Call, parse_json
from router.api.responses import deleted, parse_create
from router.http import sse
from router.http.context import Context, context_of, principal
from router.http.middleware import body_of, json_response
from router.http.readers import Whole
from router.sessions import response_object


async def create(request: web.Request) -> web.StreamResponse:
    context, who = context_of(request), principal(request, "chat")
    call = parse_create(parse_json(await body_of(request)), context.config.defaults)
    if call.stream:
        return await _stream(request, context, who.tenant, call)
    reader = Whole()
    running = await context.dispatcher.begin(who.tenant, call, reader)
    try:
        return json_response(await reader.response_in_time(), headers={"x-edge-node": reader.node})
    finally:
        context.sessions.leave(running, reader)


async def _stream(request: web.Request, context: Context, tenant: str, call: Call) -> web.StreamResponse:
    async with sse.outbox_for(context, request) as outbox:
        reader = sse.SseReader(outbox, sse.named)
        running = await context.dispatcher.begin(tenant, call, reader)
        try:
            await reader.begin()
            return await sse.send(request, reader, outbox, lambda: b"")
        finally:
            context.sessions.leave(running, reader)


async def retrieve(request: web.Request) -> web.StreamResponse:
    context, who, response_id = context_of(request), principal(request, "chat"), request.match_info["id"]
    if request.query.get("stream", "false") != "false":
        raise NotImplementedYet("`stream` when a response is retrieved")  # one JSON would be read as an empty stream
    if running := context.sessions.find(who.tenant, response_id):
        return json_response(running.session.log.response())
    return await _stored(context, who.tenant, response_id)


async def delete(request: web.Request) -> web.StreamResponse:
    """Forget a response; one that still runs is cancelled and not stored."""
    context, who, response_id = context_of(request), principal(request, "chat"), request.match_info["id"]
    running = context.sessions.find(who.tenant, response_id)
    if running:
        context.sessions.cancel(running, keep=False)
        await running.over.wait()
    known = await context.store.delete(who.tenant, response_id)
    if not (known or running):
        raise ResponseNotFound(response_id)
    return json_response(deleted(response_id))


async def cancel(request: web.Request) -> web.StreamResponse:
    """Stop a response and answer with it; one that has ended is answered as it is."""
    context, who, response_id = context_of(request), principal(request, "chat"), request.match_info["id"]
    running = context.sessions.find(who.tenant, response_id)
    if running is None:
        return await _stored(context, who.tenant, response_id)
    context.sessions.cancel(running)
    await running.over.wait()
    return json_response(running.session.log.response())


async def _stored(context: Context, tenant: str, response_id: str) -> web.Response:
    found = await context.store.get(tenant, response_id)
    if found is None:
        raise ResponseNotFound(response_id)
    return json_response(response_object(found))
