"""What a request asks of its node, in the link's words.

Pure; a failover asks the same again. Does not know the dialects that a request came in, nor conversations.
"""

from __future__ import annotations

from typing import Any

from core.frames import Sampling
from core.stream import Request

FLEX_PRIORITY = -1
"""Below everybody else's 0. Nobody gets above it by asking."""


def sampling(request: Request) -> Sampling:
    """How ids are drawn, and what is said about their probabilities."""
    return Sampling(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        top_logprobs=request.top_logprobs if request.logprobs else -1,
    )


def offered_tools(request: Request) -> list[dict[str, Any]]:
    """The functions that the model is told of, which `tool_choice` may make fewer than the client named."""
    match request.tool_choice:
        case "none":
            return []
        case {"type": "allowed_tools", "tools": [*allowed]}:
            names = {tool.get("name") for tool in allowed}
            return [tool for tool in request.tools if tool["name"] in names]
        case _:
            return request.tools


def answer_format(request: Request) -> dict[str, Any] | None:
    """The format that the answer is held to; None = any text."""
    asked: dict[str, Any] = request.text["format"]
    return None if asked["type"] == "text" else asked


def effort(request: Request) -> str:
    """How much the model reasons; "" = as it usually does."""
    return (request.reasoning or {}).get("effort") or ""


def priority(request: Request) -> int:
    """Higher goes first."""
    return FLEX_PRIORITY if request.service_tier == "flex" else 0
