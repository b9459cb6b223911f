"""One whole answer as a client of each kind hears it, and what the router keeps of it.

The clients run in threads, so that several listen while something happens to the node that answers them.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection

from router.journal import StoredResponse
from router.store.packing import unpack_response
from tests.e2e.clients import MODEL, TERMINAL, check_log, raw_socket, receive, say, sdk, text_of
from tests.e2e.processes import Fleet, Router

OURS = "edgechat:"
SDKS_OWN = {"input", "temperature", "max_output_tokens", "text", "instructions", "store", "previous_response_id"}
Event = dict[str, Any]


@dataclass
class Heard:
    """usage: input and output tokens; what of the prompt was cached may differ. nodes: in the order they answered."""

    text: str = ""
    finish: str = ""
    usage: tuple[int, int] = (0, 0)
    response_id: str = ""
    events: list[Event] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)

    def same(self) -> tuple[str, str, tuple[int, int]]:
        """What every client of the same request must have heard."""
        return self.text, self.finish, self.usage


def kept(router: Router, response_id: str) -> StoredResponse:
    """A finished response as it lies in the router's SQLite file, ids included."""
    payload = _asked(router, "SELECT payload FROM responses WHERE id = ?", response_id)
    return unpack_response(payload)


def written(router: Router, response_id: str) -> int:
    """How many ids of a running response the router has written down."""
    return int(_asked(router, "SELECT coalesce(max(next), 0) FROM said WHERE id = ?", response_id))


def _asked(router: Router, question: str, response_id: str) -> Any:
    connection = sqlite3.connect(f"file:{store_path(router)}?mode=ro", uri=True)
    try:
        (answer,) = connection.execute(question, (response_id,)).fetchone()
    finally:
        connection.close()
    return answer


def ids_at_the_move(fleet: Fleet, response_id: str) -> int:
    """How many ids were known of a response when it moved, as the router's log has it."""
    [line] = [line for line in fleet.router.log().splitlines() if f"stream {response_id} moves" in line]
    return int(line.partition(" after ")[2].split()[0])


def store_path(router: Router) -> Path:
    """Where the router's SQLite file is."""
    return Path(router.env()["ROUTER__STORE__PATH"])


def of_log(events: list[Event], nodes: Iterable[str] = ()) -> Heard:
    """What a whole event log says; checks that it is one."""
    check_log(events)
    response = events[-1]["response"]
    usage = response["usage"] or {"input_tokens": 0, "output_tokens": 0}
    return Heard(
        text=text_of(events),
        finish=finish_of(response),
        usage=(usage["input_tokens"], usage["output_tokens"]),
        response_id=response["id"],
        events=events,
        nodes=list(nodes),
    )


def finish_of(response: dict[str, Any]) -> str:
    """The status; of a failed response the code too."""
    return f"failed {response['error']['edgechat_code']}" if response["error"] else str(response["status"])


class Listener:
    """Reads a socket that offers the extensions. events: of the log, so far. nodes: who answered, so far."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.events: list[Event] = []
        self.nodes: list[str] = []

    def next(self) -> Event:
        """Take one more, of the log or of ours; raises AssertionError for an `error` event."""
        event = receive(self.socket, 120)
        assert event["type"] != "error", event
        if event["type"] == f"{OURS}node":
            self.nodes.append(event["node"])
        elif not event["type"].startswith(OURS):
            self.events.append(event)
        return event

    def until(self, wanted: Callable[[Event], bool]) -> Event:
        """Read on until one is as wanted, of the log or of ours; it must come before the end."""
        while not wanted(event := self.next()):
            assert event["type"] not in TERMINAL, f"the answer ended: {event}"
        return event

    def until_seen(self, events: int) -> None:
        """Read on until so many events of the log are there, and it is said who answers."""
        self.until(lambda _: len(self.events) >= events and bool(self.nodes))

    def to_the_end(self) -> Heard:
        """Read all that is left."""
        while not self.events or self.events[-1]["type"] not in TERMINAL:
            self.next()
        return of_log(self.events, self.nodes)


@contextmanager
def listening(fleet: Fleet, **fields: Any) -> Iterator[Listener]:
    """Ask over a WebSocket of its own."""
    with raw_socket(fleet, extensions=True) as socket:
        say(socket, **fields)
        yield Listener(socket)


def over_websocket(fleet: Fleet, **fields: Any) -> Heard:
    """Ask, and listen to the end."""
    with listening(fleet, **fields) as listener:
        return listener.to_the_end()


def over_sse(fleet: Fleet, **fields: Any) -> Heard:
    """The same with the SDK over HTTP."""
    own = {name: value for name, value in fields.items() if name in SDKS_OWN}
    more = {name: value for name, value in fields.items() if name not in SDKS_OWN}
    client: Any = sdk(fleet).with_options(timeout=120)
    with client.responses.create(model=MODEL, stream=True, extra_body=more, **own) as stream:
        return of_log([event.to_dict() for event in stream], [stream.response.headers["x-edge-node"]])


def over_chat(fleet: Fleet, **fields: Any) -> Heard:
    """The same in the older dialect, which is never stored."""
    body = dict(fields)
    messages = [{"role": "user", "content": body.pop("input")}]
    own = {"temperature": body.pop("temperature"), "max_tokens": body.pop("max_output_tokens")}
    client: Any = sdk(fleet).with_options(timeout=120)
    heard = Heard()
    with client.chat.completions.create(
        model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}, extra_body=body, **own
    ) as stream:
        heard.nodes = [stream.response.headers["x-edge-node"]]
        for chunk in stream:
            for choice in chunk.choices:
                heard.text += choice.delta.content or ""
                if choice.finish_reason is not None:
                    assert not heard.finish, "two ends"
                    heard.finish = {"length": "incomplete", "stop": "completed"}[choice.finish_reason]
            if chunk.usage is not None:
                heard.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
    return heard


def retrieved(fleet: Fleet, response_id: str, starting_after: int | None = None) -> Iterator[Event]:
    """What the SDK hears that comes back for the rest of a response; None = for all of it."""
    client: Any = sdk(fleet).with_options(timeout=120)
    more = {} if starting_after is None else {"starting_after": starting_after}
    with client.responses.retrieve(response_id, stream=True, **more) as stream:
        for event in stream:
            yield event.to_dict()


def resumed(listener: Listener, response_id: str, starting_after: int) -> None:
    """Ask for the rest of a response on this WebSocket."""
    body = {"type": f"{OURS}resume", "response_id": response_id, "starting_after": starting_after}
    listener.socket.send(json.dumps(body))


@contextmanager
def several_clients() -> Iterator[Callable[..., Future[Heard]]]:
    """Start a client with its arguments in a thread; leaving the block waits for all."""
    with ThreadPoolExecutor(8) as threads:
        yield threads.submit
