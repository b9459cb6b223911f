from __future__ import annotations

import msgspec

from core.frames import Logprobs
from core.stream import EndRecord, output_items
from router.http.kept import Kept
from router.journal import StoredResponse
from tests.router.fakes import record, words

END = EndRecord(status="completed", completed_at=1)


def response(number: int, *, logprobs: int = 0) -> StoredResponse:
    """One whose ids came with `logprobs` bytes of log-probabilities each."""
    ids, deltas = words("Hi", " there")
    said = [[Logprobs(-0.5, [], b"x" * logprobs), *delta] if logprobs else delta for delta in deltas]
    return StoredResponse(msgspec.structs.replace(record(store=False), id=f"resp_t_{number}"), ids, said, END)


SIZE_BYTES = len(msgspec.msgpack.encode(response(1)))


def test_the_oldest_go_first_when_there_are_too_many() -> None:
    kept = Kept(most=2)
    for number in (1, 2, 3):
        kept.add(response(number))
    assert list(kept) == ["resp_t_2", "resp_t_3"]
    assert "resp_t_1" not in kept


def test_the_oldest_go_first_when_they_are_too_large_together() -> None:
    kept = Kept(most_bytes=2 * SIZE_BYTES)
    for number in (1, 2, 3):
        kept.add(response(number))
    assert list(kept) == ["resp_t_2", "resp_t_3"]
    assert kept["resp_t_3"] == response(3)


def test_one_that_is_too_large_by_itself_is_not_kept() -> None:
    kept = Kept(most_bytes=SIZE_BYTES - 1)
    kept.add(response(1))
    assert len(kept) == 0


def test_log_probabilities_are_not_kept_and_nothing_of_the_conversation_is_lost() -> None:
    kept = Kept(most_bytes=SIZE_BYTES)
    kept.add(response(1, logprobs=10_000))
    found = kept["resp_t_1"]
    assert found == response(1)
    assert [item.text for item in output_items("resp_t_1", "r", found.ids, found.deltas)] == ["Hi there"]
