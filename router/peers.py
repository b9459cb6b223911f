"""What one router asks another: the client's side of the internal paths (`router/http/internal.py` is the server's).

    forward   a client's request about a response goes to the router that holds it, and its bytes come back as they come
    record    a finished response, ids included, for `previous_response_id`
    events    a response's events, for a WebSocket of ours

Knows addresses, the link secret and HTTP. Does not know who holds what (`router/finder.py`). Everything that is read is
bounded, redirects and proxies are not followed, and whoever cannot be understood is as good as not there.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import quote

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from core.errors import EdgechatError, ResponseNotFound
from core.stream import Event, Failure
from router.api.errors import from_failure
from router.errors import RouterUnreachable
from router.journal import LEASE_S, StoredResponse
from router.registry import RouterAddress

log = logging.getLogger(__name__)

RESPONSES_PATH = "/internal/responses"
TENANT_HEADER = "x-edgechat-tenant"
MSGPACK = "application/msgpack"
JSON = "application/json"
SSE = "text/event-stream"

CONNECT_S = 2.0
# For an answer that comes in one piece. A cancelled response is answered when its node has stopped.
ANSWER_S = 15.0
MAX_ANSWER_BYTES = 64 * 1024 * 1024

# What of an answer's head is for our client as well; the rest is between the routers.
_PASSED_ON = (
    *("content-type", "cache-control", "x-accel-buffering", "x-content-type-options"),
    *("x-edge-node", "x-request-id", "retry-after", "x-should-retry"),
)
_LAST = {"response.completed", "response.incomplete", "response.failed"}


class _Unusable(Exception):
    """An answer that no router of ours would give."""


# Whatever keeps an answer from being had. TimeoutError is an OSError.
_FAILURES = (aiohttp.ClientError, OSError, _Unusable, msgspec.MsgspecError, ValueError)


class _Error(msgspec.Struct):
    code: str
    message: str
    param: str | None = None


class _Refusal(msgspec.Struct):
    error: _Error


class _Numbered(msgspec.Struct):
    type: str
    sequence_number: int


class _Stopped(msgspec.Struct):
    """An `error` event: the stream ends here without the response's end."""

    code: str
    message: str


@dataclass(frozen=True)
class Following:
    """A response of another router. node: who answers it, "" if it has ended or nobody does at the moment."""

    node: str
    events: AsyncIterator[Event]


class Peers:
    """The other routers. Everything raises RouterUnreachable for one that does not answer as it should.

    secret: of the link, "" = no router can be asked. ssl_context: for those that speak TLS, None = the system's.
    """

    def __init__(self, secret: str, ssl_context: ssl.SSLContext | None = None) -> None:
        self._secret = secret
        self._ssl = ssl_context or True
        self._urls: dict[str, str] = {}
        self._opened: aiohttp.ClientSession | None = None
        self._closed = False

    def set_addresses(self, routers: Iterable[RouterAddress]) -> None:
        """The whole list of the others; what is under way with one that left it goes on."""
        self._urls = {router.name: router.url for router in routers}

    @property
    def addresses(self) -> list[RouterAddress]:
        return [RouterAddress(name, url) for name, url in sorted(self._urls.items())]

    def knows(self, router: str) -> bool:
        """Whether a router of that name can be asked."""
        return bool(self._secret) and router in self._urls

    async def close(self) -> None:
        """End what is under way; nobody can be asked any more."""
        self._closed = True
        if self._opened is not None:
            await self._opened.close()

    async def forward(
        self,
        router: str,
        request: web.Request,
        tenant: str,
        response_id: str,
        *,
        action: str = "",
        query: str = "",
        request_id: str = "",
    ) -> web.StreamResponse:
        """Have `router` answer a request.

        action: what follows the id in the path ("/cancel"). query: "" or `stream_query`. request_id: of both answers.
        A stream that breaks off there breaks off here, without an end, so that the client resumes.
        """
        streaming = aiohttp.ClientTimeout(sock_connect=CONNECT_S, sock_read=LEASE_S)
        whole = aiohttp.ClientTimeout(ANSWER_S, sock_connect=CONNECT_S)
        timeout = streaming if query else whole
        path = _path(response_id, action)
        async with self._ask(router, request.method, path, tenant, timeout, query, request_id) as answer:
            head = {name: answer.headers[name] for name in _PASSED_ON if name in answer.headers}
            if answer.status != 200 or answer.content_type != SSE:
                body = await self._json(router, answer)
                return web.Response(body=body, status=answer.status, headers=head)
            passed = web.StreamResponse(headers=head)
            await passed.prepare(request)
            try:
                async for piece in answer.content.iter_any():
                    await passed.write(piece)
            except _FAILURES as error:
                _cut(request, router, error)
            await passed.write_eof()
            return passed

    async def cancel(self, router: str, tenant: str, response_id: str) -> None:
        """Have `router` stop a response; raises ResponseNotFound."""
        timeout = aiohttp.ClientTimeout(ANSWER_S, sock_connect=CONNECT_S)
        async with self._ask(router, "POST", _path(response_id, "/cancel"), tenant, timeout) as answer:
            body = await self._json(router, answer)
            if answer.status != 200:
                raise _refusal(body)

    async def record(self, router: str, tenant: str, response_id: str) -> StoredResponse | None:
        """A finished response that `router` keeps; None if it has none of that id and tenant."""
        timeout = aiohttp.ClientTimeout(ANSWER_S, sock_connect=CONNECT_S)
        async with self._ask(router, "GET", _path(response_id, "/record"), tenant, timeout) as answer:
            if answer.status != 200 or answer.content_type != MSGPACK:
                error = _refusal(await self._json(router, answer))
                if error.code == ResponseNotFound.code:
                    return None
                raise error
            with self._believing(router):
                stored = msgspec.msgpack.decode(await _bounded(answer), type=StoredResponse)
                if (stored.record.tenant, stored.record.id) != (tenant, response_id):
                    raise _Unusable("it sent another response")
                return stored

    @asynccontextmanager
    async def events(
        self, router: str, tenant: str, response_id: str, starting_after: int = -1
    ) -> AsyncIterator[Following]:
        """Follow a response from the event after `starting_after` (-1 = all) to its end.

        Raises ResponseNotFound and RequestError as `router` does; the iterator raises what a stream that stops
        without an end was stopped by, RouterUnreachable if it just broke off.
        """
        timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_S, sock_read=LEASE_S)
        query = stream_query(starting_after)
        async with self._ask(router, "GET", _path(response_id), tenant, timeout, query) as answer:
            if answer.status != 200 or answer.content_type != SSE:
                raise _refusal(await self._json(router, answer))
            yield Following(answer.headers.get("x-edge-node", ""), self._events(router, answer, starting_after))

    async def _events(self, router: str, answer: aiohttp.ClientResponse, starting_after: int) -> AsyncIterator[Event]:
        before = starting_after
        with self._believing(router):
            async for data in sse_data(answer.content.iter_any()):
                head = msgspec.json.decode(data, type=_Numbered)
                if head.type == "error":
                    stopped = msgspec.json.decode(data, type=_Stopped)
                    raise from_failure(Failure(stopped.code, stopped.message, retryable=True))
                before += 1
                if head.sequence_number != before:
                    raise _Unusable(f"it sent event {head.sequence_number} in the place of {before}")
                yield msgspec.json.decode(data)
                if head.type in _LAST:
                    return
            # Only of what was read to its end already there is nothing left to say.
            if before != starting_after or before < 0:
                raise _Unusable("its stream has no end")

    # -- one question --------------------------------------------------------------------------

    @asynccontextmanager
    async def _ask(
        self,
        router: str,
        method: str,
        path: str,
        tenant: str,
        timeout: aiohttp.ClientTimeout,
        query: str = "",
        request_id: str = "",
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        url = self._urls.get(router) if self._secret and not self._closed else None
        if url is None:
            raise RouterUnreachable(router)
        headers = {
            "authorization": f"Bearer {self._secret}",
            TENANT_HEADER: quote(tenant, safe=""),
            "accept-encoding": "identity",
        }
        if request_id:
            headers["x-request-id"] = request_id
        where = URL(f"{url}{path}{'?' if query else ''}{query}", encoded=True)
        with self._believing(router):
            answer = await self._session().request(
                method, where, headers=headers, timeout=timeout, ssl=self._ssl, allow_redirects=False
            )
        async with answer:
            yield answer

    def _session(self) -> aiohttp.ClientSession:
        """Opened at the first question, in the loop that asks."""
        if self._opened is None:
            # Every stream of ours has a connection; our own clients' number bounds them.
            connector = aiohttp.TCPConnector(limit=0)
            self._opened = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        return self._opened

    async def _json(self, router: str, answer: aiohttp.ClientResponse) -> bytes:
        """The JSON body of an answer, a refusal if that is its status."""
        with self._believing(router):
            body = await _bounded(answer)
            if answer.content_type != JSON or (answer.status != 200 and answer.status < 400):
                raise _Unusable(f"it answered {answer.status} {answer.content_type}")
            if answer.status == 200:
                msgspec.json.decode(body, type=dict[str, msgspec.Raw])
            elif msgspec.json.decode(body, type=_Refusal).error.code == "not_found":
                raise _Unusable("it has no internal paths for us: both routers need the same link secret")
            return body

    @contextlib.contextmanager
    def _believing(self, router: str) -> Iterator[None]:
        """Whatever goes wrong inside is the other router's absence."""
        try:
            yield
        except EdgechatError:
            raise
        except _FAILURES as error:
            log.warning("router %s cannot be asked: %s", router, str(error) or type(error).__name__)
            raise RouterUnreachable(router) from error


def stream_query(starting_after: int) -> str:
    """What asks for a stream from the event after that on, -1 = from the first."""
    return "stream=true" if starting_after < 0 else f"stream=true&starting_after={starting_after}"


def _path(response_id: str, action: str = "") -> str:
    return f"{RESPONSES_PATH}/{quote(response_id, safe='')}{action}"


def _refusal(body: bytes) -> EdgechatError:
    """The error that a checked refusal says."""
    said = msgspec.json.decode(body, type=_Refusal).error
    return from_failure(Failure(said.code, said.message, retryable=False, param=said.param or ""))


async def _bounded(answer: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for piece in answer.content.iter_any():
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise _Unusable(f"its answer has more than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


async def sse_data(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The `data` of each server-sent event out of a stream of pieces that end anywhere; comments are left out."""
    held, looked = bytearray(), 0
    async for piece in pieces:
        held += piece
        while (end := held.find(b"\n\n", looked)) >= 0:
            for line in bytes(held[:end]).split(b"\n"):
                if line.startswith(b"data: "):
                    yield line.removeprefix(b"data: ")
            del held[: end + 2]
            looked = 0
        looked = max(0, len(held) - 1)
        if len(held) > MAX_ANSWER_BYTES:
            raise _Unusable(f"it sent an event of more than {MAX_ANSWER_BYTES} bytes")


def _cut(request: web.Request, router: str, error: Exception) -> NoReturn:
    """Hang up on our client in the middle of its stream: an orderly end would look like the response's."""
    if request.transport is not None and not request.transport.is_closing():
        log.warning("a stream from router %s broke off: %s", router, str(error) or type(error).__name__)
        request.transport.close()
    raise ConnectionResetError(f"the stream from router {router} broke off") from error
