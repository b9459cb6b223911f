"""Who is too far behind, and which pong proves anything."""

from __future__ import annotations

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from router.reading_pace import ENDINGS, PING_EVERY_BYTES, Pings, ReadingPace

MOST_BYTES, MOST_S = 1000, 20.0
SIZES = st.lists(st.integers(1, 500), min_size=1, max_size=4)
STEPS = st.lists(
    st.tuples(st.floats(0, 30), st.one_of(SIZES, st.integers(-10, 20_000))),
    max_size=60,
)


def pace() -> ReadingPace:
    return ReadingPace(most_bytes=MOST_BYTES, most_s=MOST_S)


def pings() -> Pings:
    salts = count()
    return Pings(lambda: next(salts).to_bytes(8, "big"))


def test_who_was_told_nothing_or_has_read_all_is_never_behind() -> None:
    reader = pace()
    assert not reader.is_behind(1e9)
    reader.say([10], 0.0)
    reader.read_to(10, 1.0)
    assert (reader.stands_s(1e9), reader.is_behind(1e9)) == (0.0, False)


def test_a_reader_is_behind_by_bytes_beyond_what_nobody_can_have_read() -> None:
    reader = pace()
    for _ in range(104):
        reader.say([10], 0.0)
    assert not reader.is_behind(0.0)
    reader.say([1], 0.0)
    assert reader.is_behind(0.0)
    reader.read_to(1, 0.0)
    assert not reader.is_behind(0.0)


def test_an_answer_longer_than_the_allowance_may_end_and_more_is_too_much() -> None:
    reader = pace()
    for _ in range(ENDINGS):
        reader.say([1500], 0.0)
    reader.say([1000], 0.0)
    assert not reader.is_behind(0.0)
    reader.say([1], 0.0)
    assert reader.is_behind(0.0)


def test_what_is_replayed_in_one_go_may_be_any_length() -> None:
    reader = pace()
    reader.say([10] * 100_000, 0.0)
    assert not reader.is_behind(MOST_S)
    assert reader.is_behind(MOST_S + 0.1)


def test_a_long_piece_that_was_read_allows_no_more_to_what_follows() -> None:
    reader = pace()
    reader.say([5000], 0.0)
    reader.say([1200], 0.0)
    reader.read_to(5000, 0.0)
    for _ in range(46):
        reader.say([100], 0.0)
    assert not reader.is_behind(0.0)
    reader.read_to(6200, 0.0)
    for _ in range(9):
        reader.say([100], 0.0)
    assert reader.is_behind(0.0)


def test_a_reader_is_behind_by_age_once_it_gets_no_further() -> None:
    reader = pace()
    reader.say([10, 10], 5.0)
    assert not reader.is_behind(25.0)
    assert reader.is_behind(25.1)
    reader.read_to(10, 25.0)
    reader.say([10], 44.0)
    assert not reader.is_behind(45.0)
    assert reader.is_behind(45.1)


def test_a_slow_reader_that_gets_further_is_not_behind_however_long_it_takes() -> None:
    reader = pace()
    reader.say([1000], 0.0)
    for second in range(19, 19 * 50, 19):
        assert not reader.is_behind(second)
        reader.read_to(second, second)


def test_silence_between_two_answers_is_not_the_readers() -> None:
    reader = pace()
    reader.say([10], 0.0)
    reader.read_to(10, 0.0)
    reader.say([10], 1000.0)
    assert not reader.is_behind(1020.0)
    assert reader.is_behind(1020.1)


@given(STEPS)
def test_whatever_is_said_and_claimed_a_kept_reader_owes_no_more_than_is_allowed(
    steps: list[tuple[float, list[int] | int]],
) -> None:
    reader, now_s, told, read, moved_s = pace(), 0.0, list[tuple[int, int]](), 0, 0.0
    said = 0
    for after_s, step in steps:
        now_s += after_s
        if isinstance(step, int):
            if min(step, said) > read:
                read, moved_s = min(step, said), now_s
            reader.read_to(step, now_s)
        else:
            if read == said:
                moved_s = now_s
            said += sum(step)
            told.append((said, max(sum(step), ENDINGS * max(step))))
            reader.say(step, now_s)
        allowed = MOST_BYTES + max((allowed for end, allowed in told if end > read), default=0)
        assert (reader.said_bytes, reader.read_bytes) == (said, read)
        assert reader.is_behind(now_s) == (said - read > allowed or (said > read and now_s - moved_s > MOST_S))


def test_a_ping_follows_every_64_kib_and_carries_the_offset() -> None:
    asking = pings()
    assert asking.after(PING_EVERY_BYTES - 1) is None
    first = asking.after(PING_EVERY_BYTES)
    assert first is not None
    assert int.from_bytes(first[:8], "big") == PING_EVERY_BYTES
    assert len(first) <= 125
    assert asking.after(2 * PING_EVERY_BYTES - 1) is None
    assert asking.after(2 * PING_EVERY_BYTES + 5) is not None


def test_what_is_short_of_a_ping_is_asked_about_once_and_only_when_no_answer_is_awaited() -> None:
    asking = pings()
    assert asking.when_quiet(0) is None
    asked = asking.when_quiet(10)
    assert asked is not None
    assert asking.when_quiet(20) is None
    assert asking.answered(asked) == 10
    assert asking.when_quiet(10) is None
    assert asking.when_quiet(20) is not None


def test_a_later_pong_answers_the_earlier_pings_too() -> None:
    asking = pings()
    first, second = asking.after(PING_EVERY_BYTES), asking.after(2 * PING_EVERY_BYTES)
    assert first is not None and second is not None
    assert asking.answered(second) == 2 * PING_EVERY_BYTES
    assert asking.answered(first) is None


@given(st.binary(max_size=125))
def test_a_pong_that_answers_no_ping_proves_nothing(payload: bytes) -> None:
    asking = Pings(lambda: b"unguessed")
    ping = asking.after(PING_EVERY_BYTES)
    assert ping is not None
    assert asking.answered(payload) is None or payload == ping


def test_a_pong_is_believed_once_and_never_from_the_offset_alone() -> None:
    asking = pings()
    ping = asking.after(PING_EVERY_BYTES)
    assert ping is not None
    assert asking.answered(PING_EVERY_BYTES.to_bytes(8, "big")) is None
    assert asking.answered((2 * PING_EVERY_BYTES).to_bytes(8, "big") + ping[8:]) is None
    assert asking.answered(ping) == PING_EVERY_BYTES
    assert asking.answered(ping) is None


def test_a_client_that_could_not_be_heard_is_given_that_time() -> None:
    pace = ReadingPace(most_bytes=100, most_s=20.0)
    pace.say([10], 0.0)
    pace.forgive(24.0)
    assert not pace.is_behind(44.0)
    assert pace.is_behind(44.1)
