from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from core.manifest import Chunk
from export.forms.fidelity import Fidelity
from export.release.journal import SYNC_EVERY_S, Entry, Journal, read_journal

KEY = "made of this, in this way"


def entry(name: str) -> Entry:
    return Entry(
        weight=name,
        places={f"{name}.codes": (0, 4000), f"{name}.scales": (4096, 12)},
        chunks=[Chunk(4096, "a" * 64), Chunk(4096, "b" * 64)],
        sources={f"model.{name}": "c" * 64},
        fidelity={f"model.{name}": Fidelity("8-bit blocks of 32", 1000, 0, 0.1 + 0.2, 1e-300, 1 / 3)},
    )


def write(path: Path, *entries: Entry, kept: tuple[Entry, ...] = ()) -> None:
    with Journal(path, KEY, kept, lambda: 0.0) as journal:
        for each in entries:
            journal.append(each)


def test_what_was_noted_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    write(tmp_path / "journal", entry("embedding"), entry("head"))
    assert read_journal(tmp_path / "journal", KEY) == [entry("embedding"), entry("head")]


def test_a_journal_is_continued_after_what_is_kept_of_it(tmp_path: Path) -> None:
    write(tmp_path / "journal", entry("embedding"), entry("damaged"))
    write(tmp_path / "journal", entry("head"), kept=(entry("embedding"),))
    assert read_journal(tmp_path / "journal", KEY) == [entry("embedding"), entry("head")]
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


def test_a_line_torn_anywhere_is_not_read_and_those_before_are(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path, entry("embedding"))
    whole = path.read_bytes()
    write(path, entry("embedding"), entry("head"))
    data = path.read_bytes()
    for end in range(len(whole), len(data)):
        path.write_bytes(data[:end])
        assert read_journal(path, KEY) == [entry("embedding")]


@pytest.mark.parametrize("damage", [b"\x00" * 40 + b"\n", b"{}\n", b'{"weight": 7}\n'])
def test_a_line_that_says_nothing_ends_the_journal(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "journal"
    write(path, entry("embedding"))
    path.write_bytes(path.read_bytes() + damage + b"more\n")
    assert read_journal(path, KEY) == [entry("embedding")]


@pytest.mark.parametrize("content", [None, b"", b"\n", b"{}\n", b'{"key":', b'{"key": "of something else"}\n'])
def test_a_journal_of_something_else_is_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "journal").write_bytes(content)
    assert read_journal(tmp_path / "journal", KEY) is None


def test_the_disk_is_asked_every_few_seconds_not_for_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, synced_at_s = 0.0, []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced_at_s.append(now_s))
    with Journal(tmp_path / "journal", KEY, (), lambda: now_s) as journal:
        for _ in range(100):
            now_s += 0.3
            journal.append(entry("embedding"))
    pauses = [after - before for before, after in pairwise(synced_at_s)]
    assert len(synced_at_s) == 6
    assert all(SYNC_EVERY_S <= pause < SYNC_EVERY_S + 0.31 for pause in pauses)
