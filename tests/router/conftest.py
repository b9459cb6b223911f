"""A real server on a real port, and clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse

from tests.router.fakes import FakeRouter, running_router, with_key


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    """The server, without nodes yet."""
    async with running_router() as router:
        yield router


@pytest.fixture
async def http(router: FakeRouter) -> AsyncIterator[ClientSession]:
    """Alice, over HTTP."""
    async with ClientSession(router.url, headers=with_key("alice")) as session:
        yield session


@pytest.fixture
async def anyone() -> AsyncIterator[ClientSession]:
    """A client that presents no key by itself and knows no router."""
    async with ClientSession() as session:
        yield session


@pytest.fixture
async def socket(router: FakeRouter, anyone: ClientSession) -> AsyncIterator[ClientWebSocketResponse]:
    """Alice, in WebSocket mode."""
    async with anyone.ws_connect(f"{router.ws_url}/v1/responses", headers=with_key("alice")) as socket:
        yield socket
