from __future__ import annotations

from core.frames import Cancel, Done, Failed, Progress, Row, Started, Timings, Tokens, Usage
from edge_node.runtime.pipe import outputs
from edge_node.switchboard import LinkId, Switchboard
from tests.edge_node.fake_engine import generate, row

A, B = LinkId(1), LinkId(2)


def done(stream: str, epoch: int = 1) -> Done:
    return Done(stream, epoch, "stop", Usage(1, 0, 1), Timings())


def test_rows_of_one_step_reach_each_router_in_one_frame() -> None:
    board = Switchboard()
    for link, stream in ((A, "a1"), (B, "b1"), (A, "a2")):
        assert board.admit(link, generate(stream))
    step: list[Row | Started | Progress | Done | Failed] = [row("a1", 0), row("b1", 0), row("a2", 0)]
    assert board.route(outputs(step)) == {
        A: [Tokens([row("a1", 0), row("a2", 0)])],
        B: [Tokens([row("b1", 0)])],
    }


def test_a_stream_starts_before_its_tokens_and_ends_after_them() -> None:
    board = Switchboard()
    board.admit(A, generate("a1"))
    board.admit(A, generate("a2"))
    step: list[Row | Started | Progress | Done | Failed] = [
        Started("a1", 1, 3, 0),
        row("a1", 0),
        done("a1"),
        Started("a2", 1, 3, 0),
        Progress("a2", 1, 2, 3),
        row("a2", 0),
    ]
    assert board.route(outputs(step))[A] == [
        Started("a1", 1, 3, 0),
        Started("a2", 1, 3, 0),
        Progress("a2", 1, 2, 3),
        Tokens([row("a1", 0), row("a2", 0)]),
        done("a1"),
    ]
    assert len(board) == 1


def test_a_stale_or_repeated_epoch_is_dropped() -> None:
    board = Switchboard()
    assert board.admit(A, generate("s", epoch=2))
    assert not board.admit(B, generate("s", epoch=2))
    assert not board.admit(B, generate("s", epoch=1))
    assert board.route(outputs([row("s", 0, epoch=2)])) == {A: [Tokens([row("s", 0, epoch=2)])]}
    assert board.dropped == 2


def test_of_two_routers_that_ask_for_one_stream_the_one_with_the_lower_epoch_is_told() -> None:
    board = Switchboard()
    board.admit(A, generate("s", epoch=2))
    assert board.contest(A, generate("s", epoch=3)) == {}, "a router may take its own stream up again"
    for first, second, loser, epoch in [(2, 1_000_001, A, 2), (2, 2, B, 2), (2, 1, B, 1)]:
        board = Switchboard()
        board.admit(A, generate("s", epoch=first))
        ((told, (failed,)),) = board.contest(B, generate("s", epoch=second)).items()
        assert isinstance(failed, Failed)
        assert (told, failed.epoch, failed.code, failed.retryable) == (loser, epoch, "response_moved", True)
        assert len(board) == 1
    assert Switchboard().contest(A, generate("s")) == {}


def test_a_higher_epoch_moves_a_stream_and_late_frames_of_the_old_one_are_dropped() -> None:
    board = Switchboard()
    board.admit(A, generate("s", epoch=1))
    assert board.admit(B, generate("s", epoch=2))
    assert board.route(outputs([row("s", 4, epoch=1), done("s", epoch=1)])) == {}
    assert board.route(outputs([row("s", 4, epoch=2)])) == {B: [Tokens([row("s", 4, epoch=2)])]}


def test_an_adopted_stream_is_out_of_reach_of_the_link_it_was_taken_from() -> None:
    board = Switchboard()
    board.admit(A, generate("s", epoch=7))
    adopted = 7 + 1_000_000
    assert board.admit(B, generate("s", epoch=adopted))
    assert board.cancel(A, Cancel("s", 7)) == board.cancel(A, Cancel("s", adopted)) == []
    assert not board.admit(A, generate("s", epoch=8)), "the old router does not know yet"
    assert board.drop_link(A) == []
    assert board.route(outputs([row("s", 0, epoch=8), done("s", epoch=7)])) == {}
    assert board.route(outputs([done("s", epoch=adopted)])) == {B: [done("s", epoch=adopted)]}
    assert len(board) == 0


def test_only_the_link_and_epoch_of_a_stream_can_cancel_it() -> None:
    board = Switchboard()
    board.admit(A, generate("s", epoch=2))
    assert board.cancel(B, Cancel("s", 2)) == []
    assert board.cancel(A, Cancel("s", 1)) == []
    assert board.cancel(A, Cancel("unknown", 1)) == []
    assert board.cancel(A, Cancel("s", 2)) == [Cancel("s", 2)]
    assert board.route(outputs([done("s", epoch=2)])) == {A: [done("s", epoch=2)]}


def test_a_lost_link_takes_its_streams_with_it_and_no_others() -> None:
    board = Switchboard()
    board.admit(A, generate("a1"))
    board.admit(B, generate("b1"))
    board.admit(A, generate("a2", epoch=3))
    assert board.drop_link(A) == [Cancel("a1", 1), Cancel("a2", 3)]
    assert board.route(outputs([row("a1", 0), row("b1", 0)])) == {B: [Tokens([row("b1", 0)])]}
    assert board.drop_link(A) == []


def test_a_lost_engine_fails_every_stream_once_and_retryably() -> None:
    board = Switchboard()
    board.admit(A, generate("a1"))
    board.admit(B, generate("b1", epoch=2))
    assert board.fail_all("engine_lost", "It stopped.") == {
        A: [Failed("a1", 1, "engine_lost", True, "It stopped.")],
        B: [Failed("b1", 2, "engine_lost", True, "It stopped.")],
    }
    assert board.fail_all("engine_lost", "It stopped.") == {}
    assert len(board) == 0
