"""The one exception tree; each leaf carries its wire code.

    EdgechatError                     code, status, retryable
      ConfigError                     config_invalid          (start-up only, never on the wire)
      ReleaseError                    release_invalid         (a manifest or its files are not what they claim)
      FrameError                      bad_frame               (a peer on the link spoke nonsense)
      RequestError                    invalid_request         400: the client can mend it
        UnknownModel                  model_not_found         404
        ContextTooLong                context_length_exceeded 400, with both numbers
        PreviousResponseNotFound      previous_response_not_found 400
        ResponseNotFound              response_not_found      404
        NotAuthorised                 invalid_api_key         401
        Forbidden                     forbidden               403
        NotImplementedYet             not_implemented         501
        UnsupportedParameter          unsupported_parameter   400
      ServiceError                    server_error            500: not the client's fault
        NoNodeAvailable               no_node_available       503, retryable
        NodeLost                      node_lost               502, retryable
        Overloaded                    overloaded              503, retryable
        StoreUnavailable              store_unavailable       503, retryable
        DeadlineExceeded              deadline_exceeded       504
        PoisonedRequest               poisoned_request        500

Every message is one sentence that says what happened, where, and what to do.
This module does not know how an error travels; `router/api` and the link translate.
"""

from __future__ import annotations


class EdgechatError(Exception):
    """Base of all errors that reach a person.

    Attributes: `code` (stable, snake_case), `status` (HTTP), `retryable` (the same request may
    work later, unchanged), `param` (the offending field of the request, if one is to blame),
    `retry_after_s` (set when there is a good guess).
    """

    code: str = "server_error"
    status: int = 500
    retryable: bool = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class ConfigError(EdgechatError):
    """A configuration key or file cannot be used; the process must not start."""

    code = "config_invalid"


class ReleaseError(EdgechatError):
    """A release's manifest or files are missing, damaged or of another format."""

    code = "release_invalid"


class FrameError(EdgechatError):
    """A peer on the link sent bytes that are no frame of this protocol."""

    code = "bad_frame"


class RequestError(EdgechatError):
    """The client's request cannot be served as it stands."""

    code = "invalid_request"
    status = 400


class UnknownModel(RequestError):
    code = "model_not_found"
    status = 404

    def __init__(self, model: str, known: list[str]) -> None:
        names = ", ".join(known) if known else "none at the moment"
        super().__init__(f"The model {model!r} is not served here; models: {names}.", param="model")


class ContextTooLong(RequestError):
    code = "context_length_exceeded"

    def __init__(self, have: int, most: int, *, at_least: bool = False) -> None:
        """at_least: the conversation was not worth counting, it has `have` or more."""
        count = f"at least {have}" if at_least else f"{have}"
        super().__init__(
            f"The conversation has {count} tokens, the model's context holds {most}; shorten it.", param="input"
        )
        self.have = have
        self.most = most


class PreviousResponseNotFound(RequestError):
    code = "previous_response_not_found"

    def __init__(self, response_id: str) -> None:
        super().__init__(
            f"Previous response with id {response_id!r} not found; send the whole conversation instead.",
            param="previous_response_id",
        )


class ResponseNotFound(RequestError):
    code = "response_not_found"
    status = 404

    def __init__(self, response_id: str) -> None:
        super().__init__(f"Response with id {response_id!r} not found.", param="response_id")


class NotAuthorised(RequestError):
    code = "invalid_api_key"
    status = 401

    def __init__(self) -> None:
        super().__init__("The API key is missing or unknown; send `Authorization: Bearer <key>`.")


class Forbidden(RequestError):
    code = "forbidden"
    status = 403

    def __init__(self, role: str) -> None:
        super().__init__(f"This key lacks the role {role!r}; use a key that has it.")


class NotImplementedYet(RequestError):
    code = "not_implemented"
    status = 501

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not implemented yet.")


class UnsupportedParameter(RequestError):
    """What is asked for is known, but the model or the node that would answer cannot do it: the message says what."""

    code = "unsupported_parameter"


class ServiceError(EdgechatError):
    """Something on our side failed; the client did nothing wrong."""


class NoNodeAvailable(ServiceError):
    code = "no_node_available"
    status = 503
    retryable = True

    def __init__(self, model: str, retry_after_s: float = 2.0) -> None:
        super().__init__(
            f"No healthy node can take a request for {model!r} right now; try again shortly.",
            retry_after_s=retry_after_s,
        )


class NodeLost(ServiceError):
    code = "node_lost"
    status = 502
    retryable = True

    def __init__(self, node: str) -> None:
        super().__init__(f"The node {node!r} was lost while it was answering; send the request again.")


class Overloaded(ServiceError):
    code = "overloaded"
    status = 503
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 2.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class StoreUnavailable(ServiceError):
    """Responses cannot be kept or read back: the message names the store and what is wrong with it."""

    code = "store_unavailable"
    status = 503
    retryable = True


class DeadlineExceeded(ServiceError):
    """The client said how long its answer is of use to it. Not retryable: another node has no more time either."""

    code = "deadline_exceeded"
    status = 504

    def __init__(self, deadline_s: float) -> None:
        super().__init__(f"The answer was not complete within the {deadline_s:g} s that it was given; allow more time.")


class PoisonedRequest(ServiceError):
    """Two engines died under it, so a third would too. Not retryable."""

    code = "poisoned_request"

    def __init__(self) -> None:
        super().__init__("Two engines stopped while they worked on this request; it is not tried again, change it.")
