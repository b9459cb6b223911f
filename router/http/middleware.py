"""Around every handler: who may call, how much at once, and errors as one sentence each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from core.errors import EdgechatError, NotImplementedYet, Overloaded, RequestError
from router.api.errors import http_body, http_headers
from router.auth import check_origin
from router.errors import Draining, TooLarge, TooSlow
from router.http import kernel
from router.http.context import context_of, principal, request_id

BODY_S = 60.0

log = logging.getLogger(__name__)


class _WithoutBytes(logging.Filter):
    """aiohttp logs the bytes of a request that it cannot read, and those may be a key or a conversation."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            record.msg, record.args = f"{record.getMessage()}: {type(error).__name__}", ()
            record.exc_info = None
        return True


logging.getLogger("aiohttp.server").addFilter(_WithoutBytes())

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# Probes must be answered whatever the load, and carry no secret.
_ALWAYS = {"/livez", "/readyz"}


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost: whatever goes wrong inside, the client gets OpenAI's shape, and never a traceback."""
    try:
        response = await handler(request)
    except EdgechatError as error:
        response = _refusal(request, error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        response = _refusal(request, _from_http(request, error))
        response.headers.update({k: v for k, v in error.headers.items() if k.lower() == "allow"})
    except ConnectionError:
        # The client went away while it was being answered: nobody is left to tell.
        raise
    except Exception:
        log.exception("request %s to %s failed", request_id(request), request.path)
        sentence = f"The router made a mistake; report the request id {request_id(request)}."
        response = _refusal(request, EdgechatError(sentence))
    if not response.prepared:
        response.headers.setdefault("x-request-id", request_id(request))
        response.headers.setdefault("x-content-type-options", "nosniff")
    return response


@web.middleware
async def admission(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Strange pages are refused, then too many connections, then everybody once the router is shutting down."""
    context = context_of(request)
    config = context.config
    context.stalls.asked(request.protocol)
    if request.transport is not None:
        kernel.bound_send_buffer(request.transport)
    check_origin(
        request.headers.get("Origin"),
        request.headers.get("Host"),
        config.listen.allowed_origins,
        loopback_only=config.auth.dev_key,
    )
    if request.path in _ALWAYS:
        return await handler(request)
    if context.dispatcher.draining:
        raise Draining
    if context.connections >= config.limits.max_connections:
        raise Overloaded(f"This router has {context.connections} connections open, which is its limit; try again.")
    context.connections += 1
    try:
        return await handler(request)
    finally:
        context.connections -= 1


def json_response(value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


async def body_of(request: web.Request) -> bytes:
    """The whole body, decompressed; raises TooLarge, TooSlow, or RequestError for one that is cut short or garbled."""
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError as error:
        raise TooSlow(BODY_S) from error
    except web.HTTPRequestEntityTooLarge as error:
        raise TooLarge(context_of(request).config.limits.max_frame_bytes) from error
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise RequestError("The body does not match its `Content-Encoding` or `Transfer-Encoding`.") from error


def _refusal(request: web.Request, error: EdgechatError) -> web.Response:
    context_of(request).metrics.refusals.labels(error.code).inc()
    return json_response(http_body(error), status=error.status, headers=http_headers(error))


def _from_http(request: web.Request, error: web.HTTPException) -> EdgechatError:
    """aiohttp's own refusals (no such path, no such method, no proper handshake) in our shape."""
    match error.status:
        case 404:
            sentence = f"There is nothing at {request.path}; see /v1/models and /v1/responses."
        case 405:
            sentence = f"{request.method} is not served at {request.path}."
        case _:
            sentence = f"The request cannot be understood: {error.text or error.reason}."
    refusal = RequestError(sentence)
    refusal.status = error.status
    refusal.code = {404: "not_found", 405: "method_not_allowed"}.get(error.status, "invalid_request")
    return refusal


async def not_implemented(request: web.Request) -> web.StreamResponse:
    principal(request, None)
    raise NotImplementedYet(f"{request.method} {request.path}")
