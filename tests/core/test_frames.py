from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.conversation import Item
from core.errors import FrameError
from core.frames import (
    Arguments,
    Cancel,
    Done,
    Drain,
    Failed,
    Frame,
    Generate,
    Hello,
    ItemEnd,
    ItemStart,
    Logprobs,
    Ping,
    Progress,
    Rates,
    Row,
    Sampling,
    Started,
    Status,
    Text,
    Timings,
    Tokens,
    ToNode,
    ToRouter,
    Usage,
    decode_to_node,
    decode_to_router,
    encode,
)

# msgspec floats are 64 bit, NaN is not equal to itself; integers travel in 64 bits; half a surrogate pair is no text.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
COUNTS = st.integers(0, 2**63 - 1)
NUMBERS = st.floats(allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | COUNTS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(NAMES, JSON, max_size=3)
IDS = st.lists(COUNTS, max_size=4)
ITEMS = st.builds(
    Item,
    kind=st.sampled_from(["message", "reasoning", "function_call", "function_call_output"]),
    role=NAMES,
    text=NAMES,
    ids=st.none() | IDS,
    release=NAMES,
    name=NAMES,
    call_id=NAMES,
    phase=NAMES,
)
DELTAS = st.one_of(
    st.builds(ItemStart, st.sampled_from(["message", "reasoning", "function_call"]), NAMES, NAMES),
    st.builds(Text, NAMES),
    st.builds(Arguments, NAMES),
    st.builds(ItemEnd),
    st.builds(Logprobs, NUMBERS, st.lists(st.tuples(COUNTS, NUMBERS), max_size=2)),
)
ROWS = st.builds(Row, NAMES, COUNTS, COUNTS, IDS, st.lists(st.lists(DELTAS, max_size=3), max_size=3))
USAGE = st.builds(Usage, COUNTS, COUNTS, COUNTS, COUNTS)
FRAMES: dict[type[Frame], st.SearchStrategy[Frame]] = {
    Hello: st.builds(
        Hello,
        *[COUNTS, NAMES, NAMES, NAMES, st.lists(NAMES, max_size=2), st.lists(NAMES, max_size=2)],
        *[COUNTS, COUNTS, COUNTS, COUNTS],
    ),
    Generate: st.builds(
        Generate,
        *[NAMES, COUNTS, NAMES, st.lists(ITEMS, max_size=3), IDS, st.integers(0, 2**64 - 1)],
        *[st.builds(Sampling, NUMBERS, NUMBERS, COUNTS), st.lists(NAMES, max_size=2), COUNTS],
        *[st.lists(OBJECTS, max_size=2), st.none() | OBJECTS, NAMES, st.sampled_from(["auto", "disabled"])],
        *[COUNTS, st.integers(-9, 9), NAMES, st.lists(NAMES, max_size=2), NUMBERS],
    ),
    Cancel: st.builds(Cancel, NAMES, COUNTS),
    Ping: st.builds(Ping, COUNTS),
    Tokens: st.builds(Tokens, st.lists(ROWS, max_size=3)),
    Started: st.builds(Started, NAMES, COUNTS, COUNTS, COUNTS, COUNTS),
    Progress: st.builds(Progress, NAMES, COUNTS, COUNTS, COUNTS),
    Done: st.builds(
        Done,
        *[NAMES, COUNTS, st.sampled_from(["stop", "length", "cancelled"])],
        *[USAGE, st.builds(Timings, NUMBERS, NUMBERS, NUMBERS)],
    ),
    Failed: st.builds(Failed, NAMES, COUNTS, NAMES, st.booleans(), NAMES, COUNTS, COUNTS),
    Status: st.builds(
        Status,
        *[NUMBERS, COUNTS, COUNTS, st.builds(Rates, NUMBERS, NUMBERS), st.lists(st.tuples(NAMES, COUNTS), max_size=2)],
        *[st.booleans(), st.booleans(), st.sampled_from(["loading", "ready", "failed"]), COUNTS, COUNTS],
    ),
    Drain: st.builds(Drain, NUMBERS),
}


def test_every_frame_is_among_those_tried() -> None:
    assert set(FRAMES) == set(get_args(ToNode)) | set(get_args(ToRouter))


@given(frame=st.one_of(*(FRAMES[kind] for kind in get_args(ToNode))))
def test_what_a_router_sends_is_what_a_node_reads(frame: ToNode) -> None:
    assert decode_to_node(encode(frame)) == frame


@given(frame=st.one_of(*(FRAMES[kind] for kind in get_args(ToRouter))))
def test_what_a_node_sends_is_what_a_router_reads(frame: ToRouter) -> None:
    assert decode_to_router(encode(frame)) == frame


@given(frame=st.one_of(*FRAMES.values()), more=st.lists(JSON, min_size=1, max_size=3))
def test_the_longer_frame_of_a_newer_peer_is_read(frame: Frame, more: list[object]) -> None:
    longer = msgspec.msgpack.encode([*msgspec.msgpack.decode(encode(frame)), *more])
    decode = decode_to_node if isinstance(frame, get_args(ToNode)) else decode_to_router
    assert decode(longer) == frame


@pytest.mark.parametrize(
    ("shorter", "frame"),
    [
        (["hello", 1, "n", "i", "eu"], Hello(1, "n", "i", "eu")),
        (["started", "s", 1, 2, 3], Started("s", 1, 2, 3)),
        (["failed", "s", 1, "c", True, "m"], Failed("s", 1, "c", True, "m")),
        (["failed", "s", 1, "c", True, "m", 0, 0, "stop"], Failed("s", 1, "c", True, "m", param="stop")),
        (["status", 0.5, 1, 2, [], [], True, False], Status(0.5, 1, 2, Rates(), [], True, False)),
        (["done", "s", 1, "stop", [1, 2, 3], []], Done("s", 1, "stop", Usage(1, 2, 3), Timings())),
        (["tokens", [["s", 1, 0, [5], [[["s", "message"]]]]]], Tokens([Row("s", 1, 0, [5], [[ItemStart("message")]])])),
    ],
)
def test_the_shorter_frame_of_an_older_node_gets_the_defaults(shorter: list[object], frame: ToRouter) -> None:
    assert decode_to_router(msgspec.msgpack.encode(shorter)) == frame


def test_the_shorter_frame_of_an_older_router_gets_the_defaults() -> None:
    shorter = ["generate", "s", 1, "r", [["message", "user", "hi"]], [], 7, [], [], 5]
    expected = Generate("s", 1, "r", [Item("message", "user", "hi")], [], 7, Sampling(), [], 5)
    assert decode_to_node(msgspec.msgpack.encode(shorter)) == expected


DEEP = (
    b"\x9b"
    + b"".join(msgspec.msgpack.encode(field) for field in ["generate", "s", 1, "r", [], [], 1, [0.0, 1.0, 0], [], 5])
    + (b"\x91\x81\xa1a" + b"\x91" * 200_000 + b"\x90")
)

NONSENSE = [
    b"",
    b"\xc1",
    encode(Ping(1))[:-1],
    encode(Ping(1)) + b"\x00",
    b"\x92\xa4ping\xa1\xff",
    b"\x92\xa1\xff\x01",
    DEEP,
    *(
        msgspec.msgpack.encode(value)
        for value in [None, 1, "ping", [], {}, {"type": "ping"}, ["nope", 1], [1, 2], ["ping"]]
    ),
    *(msgspec.msgpack.encode(value) for value in [["ping", "1"], ["ping", 1.5], ["cancel", "s", None]]),
]


@pytest.mark.parametrize("data", NONSENSE, ids=lambda data: data[:12].hex())
def test_nonsense_is_a_frame_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(FrameError, match="A router sent a frame that this node cannot read"):
        decode_to_node(data)
    with pytest.raises(FrameError, match="A node sent a frame that this router cannot read"):
        decode_to_router(data)


@given(data=st.binary(max_size=64))
def test_arbitrary_bytes_are_a_frame_or_a_frame_error(data: bytes) -> None:
    for decode, kinds in ((decode_to_node, get_args(ToNode)), (decode_to_router, get_args(ToRouter))):
        try:
            frame: object = decode(data)
        except FrameError:
            continue
        assert isinstance(frame, kinds)


@given(frame=FRAMES[Tokens], at=st.integers(0, 1 << 16), byte=st.integers(0, 255))
def test_a_flipped_byte_is_a_frame_or_a_frame_error(frame: Frame, at: int, byte: int) -> None:
    data = bytearray(encode(frame))
    data[at % len(data)] = byte
    try:
        assert isinstance(decode_to_router(bytes(data)), get_args(ToRouter))
    except FrameError as error:
        assert "cannot read" in error.message


def test_a_frame_of_the_wrong_direction_is_refused() -> None:
    with pytest.raises(FrameError):
        decode_to_node(encode(Drain(1.0)))
    with pytest.raises(FrameError):
        decode_to_router(encode(Ping(1)))


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, "\ud800", {"deep": "\udfff"}])
def test_a_value_that_the_wire_cannot_hold_is_refused_with_the_frames_name(value: object) -> None:
    frame = Generate("s", 1, "r", [], [], 1, Sampling(), [], 5, tools=[{"x": value}])
    with pytest.raises(FrameError, match="A Generate frame holds a value that cannot be sent"):
        encode(frame)
