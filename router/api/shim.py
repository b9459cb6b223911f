"""The plain dialect: `{"text": "hi"}` in, `{"reply": "..."}` out, for ten lines of browser script.

Does not know who keeps the conversation (the connection does).
"""

from __future__ import annotations

from typing import Any

import msgspec

from core.conversation import Item
from core.errors import EdgechatError
from core.stream import Request
from router.api.call import Call, parse_json, read_fields
from router.api.errors import http_body
from router.config import Defaults

SUBPROTOCOL = "edgechat.plain.v1"


class _Body(msgspec.Struct):
    text: str
    model: str = ""


def parse_message(text: str, history: list[Item], model: str, defaults: Defaults) -> Call:
    """One thing said; `model` answers unless the message names another. Raises RequestError."""
    fields = read_fields(parse_json(text), _Body)
    request = Request(
        model=fields.model or model,
        input=[Item("message", "user", fields.text)],
        store=False,
        temperature=defaults.temperature,
        top_p=defaults.top_p,
        max_output_tokens=defaults.max_output_tokens,
    )
    return Call(request=request, history=history)


def reply(text: str) -> dict[str, Any]:
    return {"reply": text}


def refusal(error: EdgechatError) -> dict[str, Any]:
    return http_body(error)
