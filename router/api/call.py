"""What every dialect's request comes down to: a `Call`, and the checks that all of them share.

Does not know the dialects nor where history is kept.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

from core.conversation import Item
from core.errors import RequestError
from core.stream import Request
from router.errors import MalformedBody

_EFFORTS = {"none": "low", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high"}
T = TypeVar("T", bound=msgspec.Struct)


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request.

    prefix: the response id's kind ("resp", "chatcmpl"). generate: False = answer at once, with nothing.
    history: items before `request.input` that this dialect brought itself (the plain shim).
    arrived_at_s: monotonic, when it came; None = just now. What waits for its turn has to say it.
    """

    request: Request
    prefix: str = "resp"
    stream: bool = False
    generate: bool = True
    seed: int | None = None
    stream_id: str | None = None
    history: list[Item] = []
    arrived_at_s: float | None = None


def rendered(request: Request, history: list[Item]) -> list[Item]:
    """The whole conversation: instructions (of this request only), what was said before, the new input."""
    system = [Item("message", "system", request.instructions)] if request.instructions else []
    return [*system, *history, *request.input]


def parse_json(text: str | bytes) -> dict[str, Any]:
    """A JSON object; raises MalformedBody with the place of the mistake."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        if _escapes_half_a_pair(text):
            sentence = "The message is no valid Unicode: it escapes half a surrogate pair; send both, or neither."
            raise MalformedBody(sentence) from error
        raise MalformedBody(f"The message is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise MalformedBody("The message must be a JSON object.")
    return value


def _escapes_half_a_pair(text: str | bytes) -> bool:
    r"""Whether an otherwise valid message has a \ud800 that is alone, which msgspec calls truncated, or malformed."""
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):
        return False
    return False


def read_fields(body: dict[str, Any], kind: type[T], inside: str = "") -> T:
    """The known fields of `body` with their types checked; others are ignored. Raises RequestError naming the field.

    inside: where in the request `body` lies, "" = it is the whole.
    """
    prefix = f"{inside}." if inside else ""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".")
        if not field and problem.startswith("Object missing required field `"):
            field = prefix + problem.split("`")[1]
            raise RequestError(f"`{field}` is missing.", param=field) from error
        field = (prefix + field).rstrip(".")
        raise RequestError(f"`{field}` is unusable: {problem}.", param=field or None) from error


def effort(asked: str | None, where: str) -> str | None:
    """The effective reasoning effort of gpt-oss, which knows three; raises RequestError naming the field `where`."""
    if asked is None:
        return None
    if asked not in _EFFORTS:
        raise RequestError(f"`{where}` is {asked!r:.60}, which is unknown; use low, medium or high.", param=where)
    return _EFFORTS[asked]


def text_parts(response: dict[str, Any]) -> list[dict[str, Any]]:
    """All parts of all messages of a response object."""
    return [part for item in response["output"] if item["type"] == "message" for part in item["content"]]


def output_text(response: dict[str, Any]) -> str:
    """All message text of a response object."""
    return "".join(part["text"] for part in text_parts(response))
