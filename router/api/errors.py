"""Errors in the shapes that clients expect: OpenAI's HTTP body, and the WebSocket `error` event.

Does not know how either travels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from core.errors import DeadlineExceeded, EdgechatError, PoisonedRequest
from core.stream import Event, Failure

RETRY_AFTER_S = 2.0
# Who set a deadline does not want to wait it twice; what kills engines must not be sent to more of them.
_NEVER_AGAIN = {DeadlineExceeded.code, PoisonedRequest.code}
_PARAMS = {"context_length_exceeded": "input"}


def error_object(error: EdgechatError) -> dict[str, Any]:
    """OpenAI's error object. type: which side has to act."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code}


def http_body(error: EdgechatError) -> dict[str, Any]:
    return {"error": error_object(error)}


def http_headers(error: EdgechatError) -> dict[str, str]:
    """`retry-after` (whole seconds, rounded up) when there is a good guess.

    SDKs send a request again after any 5xx unless told not to.
    """
    if error.code in _NEVER_AGAIN:
        return {"x-should-retry": "false"}
    if error.retry_after_s is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}


def error_event(error: EdgechatError, stream_id: str | None = None) -> Event:
    """An `error` outside any response: flat and nested form at once, because clients read either.

    It belongs to no response's log, so its `sequence_number` is 0.
    """
    nested = error_object(error)
    event: Event = {"type": "error", "sequence_number": 0, **{k: nested[k] for k in ("code", "message", "param")}}
    event |= {"status": error.status, "error": nested}
    if error.retry_after_s is not None:
        event["retry_after_ms"] = round(error.retry_after_s * 1000)
    return event if stream_id is None else event | {"stream_id": stream_id}


def from_failure(failure: Failure) -> EdgechatError:
    """Why a response failed or was refused, as the error that a client gets who was promised nothing yet."""
    kind = next((leaf for leaf in _leaves(EdgechatError) if leaf.code == failure.code), EdgechatError)
    retry_after_s = RETRY_AFTER_S if kind.status == 503 else None
    param = failure.param or _PARAMS.get(failure.code)
    error = EdgechatError(failure.message, param=param, retry_after_s=retry_after_s)
    error.code, error.status, error.retryable = failure.code, kind.status, failure.retryable
    return error


def _leaves(kind: type[EdgechatError]) -> Iterator[type[EdgechatError]]:
    for leaf in kind.__subclasses__():
        yield leaf
        yield from _leaves(leaf)
