"""The Responses dialect over plain HTTP: create, retrieve, follow, delete, cancel.

What can be done with a response that is here is done in the same way for clients and for other routers
(`router/http/internal.py`), which is why `retrieved`, `deleted` and `cancelled` take what was found.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from core.stream import Event, replay
from router.api.call import Call, parse_json
from router.api.responses import Retrieve, deletion, parse_create, parse_retrieve
from router.finder import Elsewhere, Here
from router.http import sse
from router.http.context import Context, context_of, principal, request_id
from router.http.middleware import body_of, json_response
from router.http.outbox import Outbox
from router.http.readers import Whole
from router.journal import StoredResponse
from router.peers import stream_query
from router.sessions import Running, beyond, response_object


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
            return await sse.send(request, reader, outbox, lambda: sse.stopped(reader))
        finally:
            context.sessions.leave(running, reader)


async def retrieve(request: web.Request) -> web.StreamResponse:
    """The response as it is, or (`stream=true`) its events after `starting_after` and then as they come."""
    context, who, response_id = context_of(request), principal(request, "chat"), request.match_info["id"]
    asked = parse_retrieve(request.query)

    async def read() -> web.StreamResponse:
        found = await context.finder.find(who.tenant, response_id)
        if isinstance(found, Elsewhere):
            query = stream_query(asked.starting_after) if asked.stream else ""
            return await _pass_on(request, found, who.tenant, query=query)
        return await retrieved(request, found, asked)

    return await context.finder.patiently(read)


async def delete(request: web.Request) -> web.StreamResponse:
    """Forget a response; one that still runs is cancelled and nothing of it is kept."""
    context, who, response_id = context_of(request), principal(request, "chat"), request.match_info["id"]
    found = await context.finder.find(who.tenant, response_id)
    if isinstance(found, Elsewhere):
        return await _pass_on(request, found, who.tenant)
    return await deleted(request, found)


async def cancel(request: web.Request) -> web.StreamResponse:
    """Stop a response and answer with it; one that has ended is answered as it is."""
    context, who, response_id = context_of(request), principal(request, "chat"), request.match_info["id"]
    # One that runs unstored can be cancelled by whoever knows its id, but not found.
    if running := context.sessions.find(who.tenant, response_id):
        return await cancelled(request, running)
    found = await context.finder.find(who.tenant, response_id)
    if isinstance(found, Elsewhere):
        return await _pass_on(request, found, who.tenant, action="/cancel")
    return await cancelled(request, found)


async def _pass_on(
    request: web.Request, found: Elsewhere, tenant: str, *, action: str = "", query: str = ""
) -> web.StreamResponse:
    return await context_of(request).routers.forward(
        found.router,
        request,
        tenant,
        request.match_info["id"],
        action=action,
        query=query,
        request_id=request_id(request),
    )


# -- what is here ------------------------------------------------------------------------------


async def retrieved(
    request: web.Request, found: Here, asked: Retrieve, *, beat_s: float | None = None
) -> web.StreamResponse:
    """beat_s: say something at least this often, so that the other side knows that we live; None = do not."""
    if isinstance(found, Running):
        if asked.stream:
            return await _follow(request, found, asked.starting_after, beat_s)
        return json_response(found.session.log.response())
    if asked.stream:
        return await _replay(request, found, asked.starting_after)
    return json_response(response_object(found))


async def deleted(request: web.Request, found: Here) -> web.StreamResponse:
    context = context_of(request)
    record = found.record
    if isinstance(found, Running):
        await _stop(context, found, keep=False)
    await context.store.delete(record.tenant, record.id)
    return json_response(deletion(record.id))


async def cancelled(request: web.Request, found: Here) -> web.StreamResponse:
    ended = await _stop(context_of(request), found) if isinstance(found, Running) else found
    return json_response(response_object(ended))


async def _stop(context: Context, running: Running, *, keep: bool = True) -> StoredResponse:
    """Cancel, and wait until what is left of it is settled; raises EdgechatError if that cannot be known here."""
    reader = Whole()
    context.sessions.join(running, reader)
    try:
        context.sessions.cancel(running, keep=keep)
        return await reader.ended()
    finally:
        context.sessions.leave(running, reader)


async def _follow(
    request: web.Request, running: Running, starting_after: int, beat_s: float | None
) -> web.StreamResponse:
    context = context_of(request)
    async with sse.outbox_for(context, request) as outbox:
        reader = sse.SseReader(outbox, sse.named)
        context.sessions.join(running, reader, starting_after)
        context.metrics.resumed.inc()
        try:
            async with _beating(outbox, beat_s):
                return await sse.send(request, reader, outbox, lambda: sse.stopped(reader))
        finally:
            context.sessions.leave(running, reader)


async def _replay(request: web.Request, stored: StoredResponse, starting_after: int) -> web.StreamResponse:
    context = context_of(request)
    events = replay_after(stored, starting_after)
    async with sse.outbox_for(context, request) as outbox:
        reader = sse.SseReader(outbox, sse.named)
        context.metrics.resumed.inc()
        reader.on_events(events)
        reader.on_end(stored)
        return await sse.send(request, reader, outbox, lambda: b"")


def replay_after(stored: StoredResponse, starting_after: int) -> list[Event]:
    """The events of a finished response after that one; raises RequestError if there is none such."""
    events = replay(stored.record, stored.deltas, stored.end)
    if starting_after >= len(events):
        raise beyond(starting_after, len(events) - 1)
    return events[starting_after + 1 :]


@asynccontextmanager
async def _beating(outbox: Outbox, beat_s: float | None) -> AsyncIterator[None]:
    """While the block runs, write a comment every `beat_s`."""

    async def beat(every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            outbox.put(sse.COMMENT)

    beats = None if beat_s is None else asyncio.create_task(beat(beat_s), name="beat")
    try:
        yield
    finally:
        if beats is not None:
            beats.cancel()
