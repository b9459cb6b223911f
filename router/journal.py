"""What is written down about a running response before anybody is told, and how writes are grouped.

    Session --Write(entry)--> Journal --one transaction for all that wait--> store
    Session <--on_written---- Journal <--an outcome for each entry----------

Pure: the store is a function that is handed batches. Knows neither databases nor what ids mean.
docs/decisions/053-journal.md gives the reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import msgspec

from core.conversation import Item
from core.errors import StoreUnavailable
from core.frames import Delta
from core.stream import EndRecord, RequestRecord

LEASE_S = 6.0
"""A router that was not heard of for this long has lost what it was answering."""
HEARTBEAT_S = 2.0

EPOCHS_PER_OWNER = 1_000_000
"""An adopted response goes on this many epochs above the last owner's first: none that it used can be met again."""


class StoredResponse(msgspec.Struct, frozen=True):
    """Everything that the response's event log is a function of; `deltas[i]` belongs to `ids[i]`."""

    record: RequestRecord
    ids: list[int]
    deltas: list[list[Delta]]
    end: EndRecord


class Placed(msgspec.Struct, frozen=True):
    """What the first node that read the prompt has settled for every later one.

    context_tokens: what a node must hold, so that the answer has the same room everywhere.
    """

    input_tokens: int
    cached_tokens: int
    dropped_items: int
    variant: str
    context_tokens: int


class Unfinished(msgspec.Struct, frozen=True):
    """A response that a router was answering, as far as it was written down.

    items: the whole conversation to be rendered. epoch: where the present owner's epochs begin.
    """

    record: RequestRecord
    items: list[Item]
    epoch: int = 0
    placed: Placed | None = None
    ids: list[int] = []
    deltas: list[list[Delta]] = []


# -- entries: in order, per response ---------------------------------------------------------------


class Began(msgspec.Struct, frozen=True):
    """A node has accepted it; the writer owns it from here on. Refused if that id was used before."""

    begun: Unfinished

    @property
    def id(self) -> str:
        return self.begun.record.id


class Read(msgspec.Struct, frozen=True):
    """Its prompt was understood."""

    id: str
    placed: Placed


class Said(msgspec.Struct, frozen=True):
    """Further output ids; `seq` is the position of `ids[0]`."""

    id: str
    seq: int
    ids: list[int]
    deltas: list[list[Delta]]


class Ended(msgspec.Struct, frozen=True):
    """It is complete: the whole takes the place of what was written of it. Needs no `Began` before it."""

    response: StoredResponse

    @property
    def id(self) -> str:
        return self.response.record.id


class Dropped(msgspec.Struct, frozen=True):
    """Nobody wants it: nothing that was written of it stays. Needs no `Began` before it."""

    id: str


Entry: TypeAlias = Began | Read | Said | Ended | Dropped

Outcome: TypeAlias = Literal["kept", "lost", "refused"]
"""kept: written, and so it stays. lost: another router owns the response by now, or it was deleted.
refused: the store cannot hold this very entry, or any at present."""


class Owned(NamedTuple):
    """By whom an unfinished response is held just now."""

    router: str


class Store(Protocol):
    """Where journals and finished responses lie; opened for one router (name, instance).

    Every method raises StoreUnavailable, one sentence, when nothing can be done at present.
    """

    async def write(self, entries: Sequence[Entry]) -> list[Outcome]:
        """Write all in one go, in order; an outcome for each. What is `kept` survives a killed process.

        Entries of a response that this router does not own (any more) are `lost` and change nothing.
        """

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """A tenant's finished response; another tenant's is as unknown as one that never was."""

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Forget a tenant's response, finished or not, for good; False if there was none."""

    async def claim(self, tenant: str, response_id: str) -> Unfinished | Owned | None:
        """Take over a tenant's unfinished response if its owner is gone, or is this router itself.

        Compare-and-set: of two that try, one gets it, with an `epoch` that is EPOCHS_PER_OWNER above the last.
        Owned: somebody else holds it and lives. None: there is no such unfinished response.
        """

    async def unclaimed(self) -> list[tuple[str, str]]:
        """(tenant, id) of unfinished responses whose owner is gone, then of this router's own; the oldest first.

        At most 256 more than this router began or claimed: its own do not hide what it could adopt.
        """

    async def beat(self) -> None:
        """This router lives: call every HEARTBEAT_S."""

    async def release(self) -> None:
        """This router stops: what it owns may be claimed at once."""

    async def close(self) -> None:
        """Finish what was accepted; nothing is taken any more."""


# -- group commit ----------------------------------------------------------------------------------


class _Waiting(NamedTuple):
    entry: Entry
    done: Callable[[Outcome], None]


MAX_BATCH_BYTES = 4 * 1024 * 1024
"""About what is written at once: who writes a word must not wait long for others' books, nor fail with them."""


def weight_bytes(entry: Entry) -> int:
    """About how much there is to write."""
    match entry:
        case Began(begun):
            return _texts(begun.items) + _texts(begun.record.request.input) + _ENTRY_BYTES
        case Said(_, _, ids, _):
            return _ID_BYTES * len(ids) + _ENTRY_BYTES
        case Ended(response):
            return _texts(response.record.request.input) + _ID_BYTES * len(response.ids) + _ENTRY_BYTES
        case Read() | Dropped():
            return _ENTRY_BYTES


# An id with what it made the model say, and what any entry has around it.
_ID_BYTES = 32
_ENTRY_BYTES = 512


def _texts(items: Sequence[Item]) -> int:
    return sum(len(item.text) + 4 * len(item.ids or ()) for item in items)


class Journal:
    """Invariant: at most one batch is being written; entries are written in the order in which they were put.

    commit: begin to write a batch; answer with `committed` or `failed`, never from inside the call.
    """

    def __init__(self, commit: Callable[[list[Entry]], None]) -> None:
        self._commit = commit
        self._waiting: list[_Waiting] = []
        self._writing: list[_Waiting] = []

    def __len__(self) -> int:
        """Entries without an outcome."""
        return len(self._waiting) + len(self._writing)

    def put(self, entry: Entry, done: Callable[[Outcome], None]) -> None:
        """Have an entry written by a later `flush`; `done` is told how it went."""
        self._waiting.append(_Waiting(entry, done))

    def flush(self) -> None:
        """Write all that waits, unless a batch is on its way: then as soon as that is back.

        Only so much at once: the rest follows in batches of its own, and what is larger alone.
        """
        if self._writing or not self._waiting:
            return
        count, room_bytes = 0, MAX_BATCH_BYTES
        while count < len(self._waiting) and (count == 0 or room_bytes >= weight_bytes(self._waiting[count].entry)):
            room_bytes -= weight_bytes(self._waiting[count].entry)
            count += 1
        self._writing, self._waiting = self._waiting[:count], self._waiting[count:]
        self._commit([waiting.entry for waiting in self._writing])

    def drop(self, response_id: str) -> None:
        """Forget what waits to be written of a response: its writer is gone, and another may be there any moment."""
        self._waiting = [waiting for waiting in self._waiting if waiting.entry.id != response_id]

    def committed(self, outcomes: Sequence[Outcome]) -> None:
        """The batch is written; what was put meanwhile is the next."""
        written, self._writing = self._writing, []
        for waiting, outcome in zip(written, outcomes, strict=True):
            waiting.done(outcome)
        self.flush()

    def failed(self) -> None:
        """Nothing of the batch could be written."""
        self.committed(["refused"] * len(self._writing))


def store_failure() -> StoreUnavailable:
    """What a client is told whose response cannot be written down."""
    sentence = "The router's store cannot be used at the moment; send the request again, or resume the response later."
    return StoreUnavailable(sentence, retry_after_s=2.0)
