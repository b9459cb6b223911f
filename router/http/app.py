"""The surface: which path is answered by whom."""

from __future__ import annotations

from aiohttp import web

from router import admin
from router.http import chat, internal, pages, plain_ws, responses_http, responses_ws
from router.http.context import CONTEXT, Context
from router.http.middleware import admission, errors, not_implemented
from router.peers import RESPONSES_PATH


def make_app(context: Context) -> web.Application:
    """The whole application; nothing in it outlives `context`."""
    app = web.Application(middlewares=[errors, admission], client_max_size=context.config.limits.max_frame_bytes)
    app[CONTEXT] = context
    app.add_routes(
        [
            web.get("/v1/responses", responses_ws.connect, allow_head=False),
            web.post("/v1/responses", responses_http.create),
            web.post("/v1/responses/compact", not_implemented),
            web.get("/v1/responses/{id}", responses_http.retrieve, allow_head=False),
            web.delete("/v1/responses/{id}", responses_http.delete),
            web.post("/v1/responses/{id}/cancel", responses_http.cancel),
            web.post("/v1/chat/completions", chat.create),
            web.get("/v1/models", chat.models),
            web.get("/v1/models/{model:.+}", chat.model),
            web.get("/v1/realtime", not_implemented),
            web.get("/v1/edges", admin.edges),
            web.get(RESPONSES_PATH + "/{id}", internal.retrieve, allow_head=False),
            web.delete(RESPONSES_PATH + "/{id}", internal.delete),
            web.post(RESPONSES_PATH + "/{id}/cancel", internal.cancel),
            web.get(RESPONSES_PATH + "/{id}/record", internal.record, allow_head=False),
            web.get("/ws", plain_ws.connect, allow_head=False),
            web.get("/", pages.index),
            web.get("/web/{path:.+}", pages.file),
            web.get("/livez", admin.livez),
            web.get("/readyz", admin.readyz),
            web.get("/metrics", admin.metrics),
            web.get("/fleet", admin.fleet),
        ]
    )
    return app
