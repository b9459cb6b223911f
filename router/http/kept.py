"""Unstored responses that only one connection remembers, for `previous_response_id`.

Bounded in number and in bytes. Does not know what a conversation is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import msgspec

from core.frames import Logprobs
from router.journal import StoredResponse

MAX_KEPT = 64
MAX_KEPT_BYTES = 16 * 1024 * 1024


class Kept(Mapping[str, StoredResponse]):
    """The newest responses, by id. Invariant: at most `most` of them and `most_bytes`, counted as the store would.

    They lack their log-probabilities, of which nothing that follows is a function.
    """

    def __init__(self, most: int = MAX_KEPT, most_bytes: int = MAX_KEPT_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._responses: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._bytes = 0

    def add(self, response: StoredResponse) -> None:
        """Remember a response; the oldest make room for it, and one that is too large by itself is not kept."""
        deltas = [[delta for delta in said if not isinstance(delta, Logprobs)] for said in response.deltas]
        lean = msgspec.structs.replace(response, deltas=deltas)
        size_bytes = len(msgspec.msgpack.encode(lean))
        self._responses[response.record.id] = (lean, size_bytes)
        self._bytes += size_bytes
        while len(self._responses) > self._most or self._bytes > self._most_bytes:
            _, (_, gone_bytes) = self._responses.popitem(last=False)
            self._bytes -= gone_bytes

    def __getitem__(self, response_id: str) -> StoredResponse:
        return self._responses[response_id][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._responses)

    def __len__(self) -> int:
        return len(self._responses)
