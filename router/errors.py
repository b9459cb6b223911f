"""The leaves of core/errors' tree that only a router raises.

RequestError
  OriginRefused                 origin_not_allowed      403
  HostRefused                   host_not_allowed        403
  UpgradeRequired               upgrade_required        426
  MalformedBody                 invalid_json            400
  TooLarge                      request_too_large       413
  TooSlow                       request_timeout         408
  ConnectionLimitReached        websocket_connection_limit_reached  400
ServiceError
  Draining                      draining                503, retryable
  ResponseMoved                 response_moved          503, retryable
  RouterUnreachable             router_unreachable      503, retryable
"""

from __future__ import annotations

from core.errors import RequestError, ServiceError


class OriginRefused(RequestError):
    code = "origin_not_allowed"
    status = 403

    def __init__(self, origin: str) -> None:
        super().__init__(
            f"Pages from {origin!r} may not use this router; add the origin to `listen.allowed_origins` to allow it."
        )


class HostRefused(RequestError):
    code = "host_not_allowed"
    status = 403

    def __init__(self, host: str) -> None:
        super().__init__(f"This router answers on its own machine only, not as {host!r}; call it 127.0.0.1.")


class UpgradeRequired(RequestError):
    code = "upgrade_required"
    status = 426

    def __init__(self, path: str) -> None:
        super().__init__(f"`GET {path}` is a WebSocket; open it with `Upgrade: websocket`.")


class MalformedBody(RequestError):
    code = "invalid_json"


class TooLarge(RequestError):
    code = "request_too_large"
    status = 413

    def __init__(self, most_bytes: int) -> None:
        super().__init__(f"The request is larger than {most_bytes} bytes; shorten it.")


class TooSlow(RequestError):
    code = "request_timeout"
    status = 408

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The body was not complete after {seconds:g} s; send it faster.")


class ConnectionLimitReached(RequestError):
    code = "websocket_connection_limit_reached"

    def __init__(self, minutes: int) -> None:
        super().__init__(f"A connection lives {minutes} minutes at most; open a new one and continue there.")


class Draining(ServiceError):
    code = "draining"
    status = 503
    retryable = True

    def __init__(self) -> None:
        super().__init__("This router is shutting down; connect again.", retry_after_s=1.0)


class ResponseMoved(ServiceError):
    code = "response_moved"
    status = 503
    retryable = True

    def __init__(self) -> None:
        super().__init__("Another router has taken over this response; resume it.", retry_after_s=1.0)


class RouterUnreachable(ServiceError):
    code = "router_unreachable"
    status = 503
    retryable = True

    def __init__(self, router: str) -> None:
        sentence = f"The router {router!r}, which holds this response, cannot be reached; try again shortly."
        super().__init__(sentence, retry_after_s=2.0)
