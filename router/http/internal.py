"""What other routers ask about the responses that are here (`router/peers.py` asks).

Whoever shows the link secret speaks for any tenant; for everybody else these paths do not exist. What is not here is
not looked for elsewhere: a question is passed on once.
"""

from __future__ import annotations

from urllib.parse import unquote

import msgspec
from aiohttp import web

from core.errors import RequestError, ResponseNotFound
from router.api.responses import parse_retrieve
from router.auth import is_router
from router.http import responses_http
from router.http.context import context_of
from router.journal import HEARTBEAT_S
from router.peers import MSGPACK, TENANT_HEADER


async def retrieve(request: web.Request) -> web.StreamResponse:
    tenant, response_id = _asked(request)
    asked = parse_retrieve(request.query)
    found = await context_of(request).finder.find_here(tenant, response_id)
    return await responses_http.retrieved(request, found, asked, beat_s=HEARTBEAT_S)


async def delete(request: web.Request) -> web.StreamResponse:
    tenant, response_id = _asked(request)
    return await responses_http.deleted(request, await context_of(request).finder.find_here(tenant, response_id))


async def cancel(request: web.Request) -> web.StreamResponse:
    tenant, response_id = _asked(request)
    return await responses_http.cancelled(request, await context_of(request).finder.find_here(tenant, response_id))


async def record(request: web.Request) -> web.StreamResponse:
    """A finished response with its ids, as it is stored."""
    tenant, response_id = _asked(request)
    stored = await context_of(request).store.get(tenant, response_id)
    if stored is None:
        raise ResponseNotFound(response_id)
    return web.Response(body=msgspec.msgpack.encode(stored), content_type=MSGPACK)


def _asked(request: web.Request) -> tuple[str, str]:
    """Tenant and response id of a router's question; raises HTTPNotFound for anybody else's."""
    if not is_router(request.headers.get("Authorization"), context_of(request).link_secret):
        raise web.HTTPNotFound
    tenant = unquote(request.headers.get(TENANT_HEADER, ""))
    if not tenant:
        raise RequestError(f"The header `{TENANT_HEADER}` is missing.")
    return tenant, request.match_info["id"]
