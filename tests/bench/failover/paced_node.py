"""A node without an engine: says as many ids as it is asked for, at the pace that the prompt names, each with the time
at which it was said. What a router does with a token can be measured with it, and how many it can take.

    python -m tests.bench.failover.paced_node --port 8081

Speaks the link as a node does (one Tokens frame a step for all streams of a pace); checks no secret.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import time
from http import HTTPStatus

import msgspec
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from core.frames import (
    PROTOCOL,
    SPEECH_VERSION,
    Cancel,
    Delta,
    Done,
    Generate,
    Hello,
    ItemStart,
    Ping,
    Rates,
    Row,
    Started,
    Status,
    Text,
    Timings,
    Tokens,
    ToRouter,
    Usage,
    decode_to_node,
    encode,
)

MODEL = "paced"
RELEASE = "paced@0123456789ab"
SLOTS = 1024
CONTEXT_TOKENS = 1 << 20
STATUS_S = 0.25


class Pace(msgspec.Struct, frozen=True):
    """What a prompt says, as JSON. step_s: between two ids, 0 = as fast as the router takes them.

    pad: how many characters each id has beside its time.
    """

    step_s: float
    pad: int = 0


class _Stream(msgspec.Struct):
    request: Generate
    pace: Pace
    said: int = 0


class PacedLink:
    """One router's link."""

    def __init__(self, link: ServerConnection) -> None:
        self._link = link
        self._streams: dict[str, _Stream] = {}
        self._steps: dict[float, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until the router leaves."""
        await self._link.recv()
        hello = Hello(PROTOCOL, "paced", "1", "here", [RELEASE], ["none"], CONTEXT_TOKENS, SLOTS, SPEECH_VERSION)
        await self._send(hello)
        telling = asyncio.create_task(self._keep_telling())
        try:
            async for message in self._link:
                assert isinstance(message, bytes)
                await self._on_frame(message)
        finally:
            for task in (telling, *self._steps.values()):
                task.cancel()

    async def _on_frame(self, message: bytes) -> None:
        match decode_to_node(message):
            case Generate() as request:
                pace = msgspec.json.decode(request.items[-1].text, type=Pace)
                await self._send(Started(request.stream, request.epoch, 5, 0))
                self._streams[request.stream] = _Stream(request, pace)
                if pace.step_s not in self._steps:
                    self._steps[pace.step_s] = asyncio.create_task(self._step(pace.step_s))
            case Cancel(stream):
                self._streams.pop(stream, None)
            case Ping(nonce):
                await self._send(self._status(nonce))

    async def _step(self, step_s: float) -> None:
        """Say an id of every stream of this pace, again and again, while there are any."""
        began_s = time.monotonic()
        for number in itertools.count(1):
            streams = [stream for stream in self._streams.values() if stream.pace.step_s == step_s]
            if not streams:
                break
            await self._send(Tokens([_row(stream) for stream in streams]))
            for stream in streams:
                if stream.said == stream.request.max_output_tokens:
                    await self._end(stream)
            # Never so fast that nothing else is heard or told: `send` alone need not wait.
            await asyncio.sleep(began_s + number * step_s - time.monotonic() if step_s else 0)
        del self._steps[step_s]

    async def _end(self, stream: _Stream) -> None:
        request = stream.request
        if self._streams.pop(request.stream, None) is not None:
            await self._send(Done(request.stream, request.epoch, "length", Usage(5, 0, stream.said), Timings()))

    async def _keep_telling(self) -> None:
        while True:
            await self._send(self._status())
            await asyncio.sleep(STATUS_S)

    def _status(self, echo: int = 0) -> Status:
        return Status(
            len(self._streams) / SLOTS, len(self._streams), 0, Rates(), [], True, False, engine_pid=1, echo=echo
        )

    async def _send(self, frame: ToRouter) -> None:
        await self._link.send(encode(frame))


def _row(stream: _Stream) -> Row:
    deltas: list[Delta] = [] if stream.said else [ItemStart("message", "final_answer")]
    deltas.append(Text(f"{time.monotonic_ns()} {'x' * stream.pace.pad}"))
    row = Row(stream.request.stream, stream.request.epoch, stream.said, [100], [deltas])
    stream.said += 1
    return row


def _probes(link: ServerConnection, request: Request) -> Response | None:
    return link.respond(HTTPStatus.OK, "ready\n") if request.path == "/readyz" else None


async def _serve(port: int) -> None:
    async with serve(
        lambda link: PacedLink(link).run(), "127.0.0.1", port, compression=None, process_request=_probes
    ) as server:
        await server.serve_forever()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
