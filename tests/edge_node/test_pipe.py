from __future__ import annotations

import socket

import pytest

from core.errors import FrameError
from core.frames import Cancel, Rates
from edge_node.runtime import pipe
from edge_node.runtime.pipe import Beat, Fatal, Load, Loaded, Residents, ToChild, ToParent, outputs
from edge_node.runtime.worker import Pipe, Pulse
from tests.edge_node.fake_engine import IDLE, generate, row

LOAD = Load("folder", "tiny@0123456789ab", "test", "cpu", 1, 2, 64, 4, 0.0, 1 << 20, True, 20, True, 1.0)


@pytest.mark.parametrize("message", [LOAD, generate("s"), Cancel("s", 1)])
def test_what_the_node_says_arrives_as_it_was_said(message: ToChild) -> None:
    data = pipe.encode(message)
    assert pipe.body_bytes(data[: pipe.HEADER_BYTES]) == len(data) - pipe.HEADER_BYTES
    assert pipe.decode_to_child(data[pipe.HEADER_BYTES :]) == message


@pytest.mark.parametrize(
    "message",
    [Loaded(1.5), IDLE, outputs([row("s", 0)]), Residents([("key", 64)]), Fatal("release_invalid", "No.")],
)
def test_what_the_engine_says_arrives_as_it_was_said(message: ToParent) -> None:
    assert pipe.decode_to_parent(pipe.encode(message)[pipe.HEADER_BYTES :]) == message


def test_a_frame_that_claims_to_be_huge_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameError, match="claims 4294967295 bytes"):
        pipe.body_bytes(b"\xff\xff\xff\xff")


def test_bytes_that_are_no_frame_are_refused() -> None:
    with pytest.raises(FrameError):
        pipe.decode_to_child(b"\x91\xa4what")
    with pytest.raises(FrameError):
        pipe.decode_to_parent(b"")


def test_the_engine_reads_frames_that_arrive_in_pieces_and_sees_the_end() -> None:
    node, engine = socket.socketpair()
    with node, engine:
        end = Pipe(engine)
        data = pipe.encode(generate("s")) + pipe.encode(Cancel("s", 1))
        node.sendall(data[:3])
        node.sendall(data[3:50])
        node.sendall(data[50:])
        assert end.receive() == generate("s")
        assert end.receive() == Cancel("s", 1)
        node.sendall(data[:10])
        node.shutdown(socket.SHUT_WR)
        assert end.receive() is None


def test_a_pulse_tells_how_long_the_engine_has_been_at_it() -> None:
    rates = Rates(100.0, 10.0)
    assert Pulse(7, 10.0, 0.5, 2, 1, rates).beat(12.5) == Beat(7, 2.5, 0.5, 2, 1, rates)
    assert Pulse(7, None, 0.0, 0, 0, rates).beat(12.5) == Beat(7, -1.0, 0.0, 0, 0, rates)
