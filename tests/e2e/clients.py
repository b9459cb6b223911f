"""The clients of the end-to-end tests: the unmodified SDK, and raw WebSockets where its manners hide the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter
from websockets.sync.client import ClientConnection, connect

from tests.e2e.processes import Fleet

MODEL = "smollm2-135m"
TERMINAL = {"response.completed", "response.incomplete", "response.failed"}
_EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def sdk(fleet: Fleet, key: str = "dev") -> openai.OpenAI:
    """The real SDK, pointed at the router, told not to paper over failures by retrying."""
    return openai.OpenAI(base_url=fleet.base_url, api_key=key, max_retries=0, timeout=60)


@contextmanager
def raw_socket(fleet: Fleet, *, extensions: bool = False, key: str = "dev") -> Iterator[ClientConnection]:
    """A bare WebSocket in Responses mode."""
    offered = ["responses.v1.json", *(["edgechat.ext.v1"] if extensions else [])]
    with connect(
        f"{fleet.base_url.replace('http', 'ws', 1)}/responses",
        additional_headers={"Authorization": f"Bearer {key}"},
        subprotocols=offered,  # type: ignore[arg-type]  # plain strings are fine; the type is a NewType
        max_size=None,
        proxy=None,
    ) as socket:
        yield socket


def say(socket: ClientConnection, **fields: Any) -> None:
    """Send a client event; `response.create` unless `type` says otherwise."""
    socket.send(json.dumps({"type": "response.create", "model": MODEL, **fields}))


def receive(socket: ClientConnection, timeout_s: float = 60) -> dict[str, Any]:
    """The next event."""
    event: dict[str, Any] = json.loads(socket.recv(timeout=timeout_s))
    return event


def until_terminal(socket: ClientConnection) -> list[dict[str, Any]]:
    """All events up to the end of the response; an `error` event fails the test."""
    events: list[dict[str, Any]] = []
    while not events or events[-1]["type"] not in TERMINAL:
        events.append(receive(socket))
        assert events[-1]["type"] != "error", events[-1]
    return events


def answer(socket: ClientConnection, **fields: Any) -> list[dict[str, Any]]:
    """One whole response over a raw socket."""
    say(socket, **fields)
    return until_terminal(socket)


def check_log(events: list[dict[str, Any]]) -> None:
    """What holds for every event log: numbered 0..n, valid for the SDK, exactly one terminal event, last."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        _EVENTS.validate_python(event)
    assert [event["type"] for event in events if event["type"] in TERMINAL] == [events[-1]["type"]]


def text_of(events: list[dict[str, Any]]) -> str:
    """The text that the deltas add up to."""
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
