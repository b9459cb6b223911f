"""Ask and wait: the two things that end-to-end tests do between faults. Never sleeps for a fixed time."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

POLL_S = 0.05
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is never behind a proxy

T = TypeVar("T")
PENDING = (OSError, AssertionError, LookupError, ValueError)
"""What a predicate may raise to mean 'not yet': the last one is shown if it never comes true."""


def eventually(predicate: Callable[[], T], timeout_s: float = 30.0, what: str = "") -> T:
    """Call `predicate` until what it returns is true, and return that.

    Raises AssertionError, with the last value or error, after `timeout_s`. In an async test use `eventually_async`.
    """
    end_s = time.monotonic() + timeout_s
    while True:
        value, error = attempt(predicate)
        if value:
            return value
        if time.monotonic() >= end_s:
            raise never(what, predicate, value, timeout_s) from error
        time.sleep(POLL_S)


@overload
async def eventually_async(predicate: Callable[[], Awaitable[T]], timeout_s: float = 30.0, what: str = "") -> T: ...
@overload
async def eventually_async(predicate: Callable[[], T], timeout_s: float = 30.0, what: str = "") -> T: ...
async def eventually_async(predicate: Callable[[], T | Awaitable[T]], timeout_s: float = 30.0, what: str = "") -> T:
    """Do as `eventually` does without blocking the loop; the predicate may be async."""
    end_s = time.monotonic() + timeout_s
    while True:
        value, error = attempt(predicate)
        if inspect.isawaitable(value):
            try:
                value = await value
            except PENDING as raised:
                value, error = None, raised
        if value:
            return value
        if time.monotonic() >= end_s:
            raise never(what, predicate, value, timeout_s) from error
        await asyncio.sleep(POLL_S)


def attempt(predicate: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Return what the predicate returns, or the error that it raised."""
    try:
        return predicate(), None
    except PENDING as error:
        return None, error


def never(what: str, predicate: Callable[..., object], value: object, timeout_s: float) -> AssertionError:
    """Say what did not come true."""
    awaited = what or inspect.getsource(predicate).strip()
    return AssertionError(f"not within {timeout_s:g} s: {awaited} (last value: {value!r})")


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer of any status."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)


def http(
    url: str, *, method: str = "GET", key: str | None = "dev", body: object = None, timeout_s: float = 30
) -> Answer:
    """Make one request to loopback; raises OSError only if there is no answer."""
    request = urllib.request.Request(url, method=method)
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    if body is not None:
        request.data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    try:
        with DIRECT.open(request, timeout=timeout_s) as answer:
            return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())
