"""What operators and orchestrators ask: alive, ready, metrics, the fleet, the edges."""

from __future__ import annotations

from collections import Counter

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from router.config import nameless_routers
from router.fleet import aliases
from router.http.context import Context, context_of, principal
from router.http.middleware import json_response
from router.registry import RouterAddress


async def livez(request: web.Request) -> web.StreamResponse:
    return json_response({"status": "alive"})


async def readyz(request: web.Request) -> web.StreamResponse:
    """200 while at least one node can be given a stream and the router is not shutting down."""
    context = context_of(request)
    nodes = len(context.fleet.ready(context.now().mono_s))
    if context.dispatcher.draining:
        return json_response({"status": "draining", "nodes": nodes}, status=503)
    return json_response({"status": "ready" if nodes else "no node", "nodes": nodes}, status=200 if nodes else 503)


async def metrics(request: web.Request) -> web.StreamResponse:
    principal(request, "admin")
    context = context_of(request)
    told = context.metrics
    told.running.set(len(context.sessions))
    told.connections.set(context.connections)
    told.nodes.clear()
    for state, count in Counter(row.state for row in context.fleet.rows(context.now().mono_s)).items():
        told.nodes.labels(state).set(count)
    return web.Response(body=told.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})


async def fleet(request: web.Request) -> web.StreamResponse:
    principal(request, "admin")
    context = context_of(request)
    return json_response({"nodes": context.fleet.rows(context.now().mono_s)})


class Edge(msgspec.Struct, frozen=True):
    """A place that answers, as any client may see it."""

    name: str
    region: str
    models: list[str]
    available: bool
    rtt_ms: float | None


async def edges(request: web.Request) -> web.StreamResponse:
    """The routers a client may choose from, and the nodes behind this one."""
    principal(request, None)
    context = context_of(request)
    rows = context.fleet.rows(context.now().mono_s)
    found = [Edge(row.name, row.region, aliases(row.releases), row.state == "ready", row.rtt_ms) for row in rows]
    config = context.config
    here = {"router": config.router.name, "region": config.router.region, "routers": _routers(context)}
    return json_response({"object": "list", **here, "data": found})


def _routers(context: Context) -> list[RouterAddress]:
    """Those that are known by name, then those that the configuration lists without one."""
    nameless = nameless_routers(context.config.discovery.routers)
    return [*context.routers.addresses, *(RouterAddress("", url) for url in nameless)]
