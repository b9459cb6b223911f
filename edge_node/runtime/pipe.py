"""What parent and child say to each other over their socketpair: MessagePack behind a 4-byte length.

Both ends are always the same version of this program, so the frames carry no version. Does not know
sockets: `encode` gives the bytes to send, the decoders take one frame's body.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from core.errors import FrameError
from core.frames import MAX_FRAME_BYTES, Cancel, Done, Failed, Generate, Progress, Rates, Row, Started

HEADER_BYTES = 4
# A Generate passes through nearly as it came from a router; the rest is small.
MAX_BODY_BYTES = 2 * MAX_FRAME_BYTES


class _Message(msgspec.Struct, frozen=True, array_like=True):
    pass


# -- parent -> child ---------------------------------------------------------------------------


class Load(_Message, frozen=True, tag="load"):
    """First message: what to serve. `release` and `variant` are what the parent has told others.

    threads: at least 1. context_tokens: already capped by the release. max_stall_ms: 0 = the engine's default.
    kv_cache_bytes: memory for prefix blocks, 0 = none. failover_exact_s: as EngineLimits has it.
    """

    folder: str
    release: str
    variant: str
    device: Literal["cpu", "cuda"]
    threads: int
    slots: int
    context_tokens: int
    max_waiting: int
    max_stall_ms: float
    kv_cache_bytes: int
    speculation: bool
    spin_us: int
    verify: bool
    failover_exact_s: float


ToChild: TypeAlias = Load | Generate | Cancel


# -- child -> parent ---------------------------------------------------------------------------


class Loaded(_Message, frozen=True, tag="loaded"):
    """The engine takes requests from now on. load_s: seconds that it took."""

    load_s: float


class Beat(_Message, frozen=True, tag="beat"):
    """Sent every BEAT_S by a thread of its own.

    step: steps begun so far. age_s: of what the engine's thread is doing, < 0 when it waits for work.
    predicted_s: of the running step, 0 between steps. yielding: of those running and waiting, how many are of a
    priority below 0.
    """

    step: int
    age_s: float
    predicted_s: float
    running: int
    waiting: int
    rates: Rates
    yielding: int = 0


class Outputs(_Message, frozen=True, tag="outputs"):
    """All that one step (or one submission) gave, in the order in which routers must see it."""

    before: list[Started | Progress]
    rows: list[Row]
    after: list[Done | Failed]


class Residents(_Message, frozen=True, tag="residents"):
    """What has changed in the prefix store: (prefix key, resident tokens), 0 = gone. A new child holds nothing."""

    chains: list[tuple[str, int]]


class Fatal(_Message, frozen=True, tag="fatal"):
    """The child cannot serve and ends; `message` is one sentence for a person."""

    code: str
    message: str


ToParent: TypeAlias = Loaded | Beat | Outputs | Residents | Fatal

_encoder = msgspec.msgpack.Encoder()
_to_child: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)
_to_parent: msgspec.msgpack.Decoder[ToParent] = msgspec.msgpack.Decoder(ToParent)


def encode(message: ToChild | ToParent) -> bytes:
    """Length and body."""
    body = _encoder.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


def body_bytes(header: bytes) -> int:
    """Length of the body that follows `header`; raises FrameError when no frame is that long."""
    length = int.from_bytes(header, "little")
    if length > MAX_BODY_BYTES:
        raise FrameError(f"A frame between node and engine claims {length} bytes, more than {MAX_BODY_BYTES}.")
    return length


def decode_to_child(body: bytes) -> ToChild:
    try:
        return _to_child.decode(body)
    except msgspec.MsgspecError as error:
        raise FrameError(f"The node sent its engine an unreadable frame: {error}.") from error


def decode_to_parent(body: bytes) -> ToParent:
    try:
        return _to_parent.decode(body)
    except msgspec.MsgspecError as error:
        raise FrameError(f"The engine sent its node an unreadable frame: {error}.") from error


def outputs(frames: list[Row | Started | Progress | Done | Failed]) -> Outputs:
    """Sort a step's output: a stream's Started and Progress come before its Row, Done and Failed after it."""
    before: list[Started | Progress] = []
    rows: list[Row] = []
    after: list[Done | Failed] = []
    for frame in frames:
        match frame:
            case Started() | Progress():
                before.append(frame)
            case Row():
                rows.append(frame)
            case Done() | Failed():
                after.append(frame)
    return Outputs(before, rows, after)
