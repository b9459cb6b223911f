from __future__ import annotations

from tests.tools.peak_rss import run_measured


def test_a_peak_is_the_process_s_own_and_not_its_parent_s() -> None:
    held = bytearray(b"x" * 300_000_000)  # this process's own peak
    assert run_measured("this", []) < 100
    assert len(held) == 300_000_000
