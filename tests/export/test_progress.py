from __future__ import annotations

import io
from dataclasses import dataclass

import pytest

from export.progress import Moment, Progress, peak_memory_bytes

GIGABYTE = 1_000_000_000


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(stream: io.StringIO, clock: Clock, kept_bytes: int = 0) -> Progress:
    return Progress(10 * GIGABYTE, kept_bytes, stream, clock, lambda: 3 * GIGABYTE // 2)


def test_a_moment_is_told_in_figures_a_person_wants() -> None:
    moment = Moment(kept_bytes=0, done_bytes=4 * GIGABYTE, total_bytes=10 * GIGABYTE, elapsed_s=8.0)
    assert moment.describe(1_100_000_000) == "4.0 of 10.0 GB, 0.50 GB/s, 12 s left, peak RSS 1.1 GB"
    assert moment.summarise(1_100_000_000) == "4.0 GB in 8.0 s (0.50 GB/s), peak RSS 1.1 GB"


def test_bytes_that_were_kept_do_not_count_as_speed() -> None:
    moment = Moment(kept_bytes=4 * GIGABYTE, done_bytes=6 * GIGABYTE, total_bytes=10 * GIGABYTE, elapsed_s=4.0)
    assert moment.describe(0).startswith("6.0 of 10.0 GB, 0.50 GB/s, 8 s left")
    assert moment.summarise(0).startswith("2.0 GB in 4.0 s (0.50 GB/s), 4.0 GB kept")


def test_nothing_is_promised_before_anything_was_written() -> None:
    assert "time left unknown" in Moment(0, 0, GIGABYTE, 0.0).describe(0)


def test_a_log_gets_a_line_at_most_every_ten_seconds_and_one_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress(stream, clock) as shown:
        for step in range(1, 51):
            clock.now_s += 0.5
            shown.show("embedding", step * GIGABYTE // 5)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "export: embedding: 4.0 of 10.0 GB, 0.40 GB/s, 15 s left, peak RSS 1.5 GB",
        "export: embedding: 8.0 of 10.0 GB, 0.40 GB/s, 5 s left, peak RSS 1.5 GB",
        "export: wrote 10.0 GB in 25.0 s (0.40 GB/s), peak RSS 1.5 GB",
    ]


def test_a_failed_export_ends_without_a_summary() -> None:
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), progress(stream, Clock()) as shown:
        shown.show("embedding", GIGABYTE)
        raise ZeroDivisionError
    assert stream.getvalue() == ""


def test_a_terminal_shows_one_live_line_that_goes_away() -> None:
    stream, clock = Terminal(), Clock()
    with progress(stream, clock) as shown:
        clock.now_s += 1
        shown.show("embedding", GIGABYTE)
    text = stream.getvalue()
    assert "embedding: 1.0 of 10.0 GB, 1.00 GB/s, 9 s left, peak RSS 1.5 GB" in text
    assert text.count("\n") == 1
    assert text.endswith("\rexport: wrote 1.0 GB in 1.0 s (1.00 GB/s), peak RSS 1.5 GB\n")


def test_peak_memory_is_this_process_s_own() -> None:
    assert 10_000_000 < peak_memory_bytes() < 100 * GIGABYTE
