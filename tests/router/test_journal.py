"""Group commit: one batch at a time, in order, each entry told once how it went."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core.conversation import Item
from router.journal import MAX_BATCH_BYTES, Began, Dropped, Entry, Journal, Outcome, Unfinished, weight_bytes
from tests.router.fakes import record


class Disk:
    """Keeps the batch in hand until the test lets it be written."""

    def __init__(self) -> None:
        self.batches: list[list[Entry]] = []
        self.told: list[tuple[str, Outcome]] = []
        self.journal = Journal(self.batches.append)

    def put(self, *names: str) -> None:
        for name in names:
            self.journal.put(Dropped(name), lambda outcome, name=name: self.told.append((name, outcome)))  # type: ignore[misc]


def names(batch: list[Entry]) -> list[str]:
    return [entry.id for entry in batch]


def test_what_waited_when_the_last_batch_came_back_is_one_batch() -> None:
    disk = Disk()
    disk.put("a")
    disk.journal.flush()
    disk.put("b", "c")
    disk.journal.flush()
    assert [names(batch) for batch in disk.batches] == [["a"]]
    disk.journal.committed(["kept"])
    assert [names(batch) for batch in disk.batches] == [["a"], ["b", "c"]]
    assert disk.told == [("a", "kept")]
    assert len(disk.journal) == 2


def test_nothing_is_written_before_it_is_asked_for_and_nothing_empty_ever() -> None:
    disk = Disk()
    disk.journal.flush()
    disk.put("a")
    assert disk.batches == []
    disk.journal.flush()
    disk.journal.committed(["kept"])
    assert len(disk.batches) == 1


def test_each_entry_hears_its_own_outcome() -> None:
    disk = Disk()
    disk.put("a", "b", "c")
    disk.journal.flush()
    disk.journal.committed(["kept", "lost", "refused"])
    assert disk.told == [("a", "kept"), ("b", "lost"), ("c", "refused")]


def test_a_batch_that_failed_is_refused_whole_and_the_next_is_tried() -> None:
    disk = Disk()
    disk.put("a", "b")
    disk.journal.flush()
    disk.put("c")
    disk.journal.failed()
    assert disk.told == [("a", "refused"), ("b", "refused")]
    assert [names(batch) for batch in disk.batches] == [["a", "b"], ["c"]]


def test_what_waits_of_a_response_can_be_forgotten() -> None:
    disk = Disk()
    disk.put("a")
    disk.journal.flush()
    disk.put("a", "b", "a")
    disk.journal.drop("a")
    disk.journal.committed(["refused"])
    assert [names(batch) for batch in disk.batches] == [["a"], ["b"]]
    assert disk.told == [("a", "refused")]


def test_a_word_does_not_wait_for_a_book_nor_books_for_each_other() -> None:
    disk = Disk()
    made = record(input=[Item("message", "user", "x" * (MAX_BATCH_BYTES // 2))])
    book = Began(Unfinished(made, []))
    assert MAX_BATCH_BYTES // 2 < weight_bytes(book) < MAX_BATCH_BYTES
    for entry in (Dropped("word"), book, Dropped("word"), book, book, Dropped("word")):
        disk.journal.put(entry, lambda outcome: None)
    disk.journal.flush()
    while len(disk.journal):
        disk.journal.committed(["kept"] * len(disk.batches[-1]))
    assert [len(batch) for batch in disk.batches] == [3, 1, 2]


def test_what_is_larger_than_a_batch_is_written_alone() -> None:
    disk = Disk()
    huge = Began(Unfinished(record(), [Item("message", "user", "x" * (2 * MAX_BATCH_BYTES))]))
    disk.journal.put(huge, lambda outcome: None)
    disk.journal.put(Dropped("word"), lambda outcome: None)
    disk.journal.flush()
    disk.journal.committed(["kept"])
    assert [[type(entry) for entry in batch] for batch in disk.batches] == [[Began], [Dropped]]


@given(st.lists(st.one_of(st.integers(1, 3), st.just("flush"), st.just("back")), max_size=40))
def test_whatever_the_rhythm_all_is_written_once_in_the_order_in_which_it_was_put(steps: list[int | str]) -> None:
    disk, put, back = Disk(), 0, 0
    for step in [*steps, "flush", *["back"] * len(steps)]:
        if isinstance(step, int):
            disk.put(*map(str, range(put, put + step)))
            put += step
        elif step == "flush":
            disk.journal.flush()
        elif back < len(disk.batches):
            back += 1
            disk.journal.committed(["kept"] * len(disk.batches[back - 1]))
            assert len(disk.batches) <= back + 1
    assert [name for batch in disk.batches for name in names(batch)] == [str(number) for number in range(put)]
    assert [name for name, _ in disk.told] == [str(number) for number in range(put)]
    assert len(disk.journal) == 0
