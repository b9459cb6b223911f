"""How what a store keeps is written: MessagePack, the same in every database.

Does not know where the bytes lie, nor whose they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import msgspec

from core.frames import Delta
from router.journal import Began, Dropped, Ended, Entry, Placed, Read, Said, StoredResponse, Unfinished

T = TypeVar("T")

MAX_BYTES = 256 * 1024 * 1024
"""Of one packed value: below what SQLite (1 GB) and Redis (512 MB) can hold."""


class Unpackable(ValueError):
    """This very entry cannot be written; others can."""


class Damaged(ValueError):
    """What lies in the store is not what was written there."""


class _Piece(msgspec.Struct, frozen=True, array_like=True):
    """What one `Said` adds."""

    seq: int
    ids: list[int]
    deltas: list[list[Delta]]


_encoder = msgspec.msgpack.Encoder()
_responses: msgspec.msgpack.Decoder[StoredResponse] = msgspec.msgpack.Decoder(StoredResponse)
_openings: msgspec.msgpack.Decoder[Unfinished] = msgspec.msgpack.Decoder(Unfinished)
_placings: msgspec.msgpack.Decoder[Placed] = msgspec.msgpack.Decoder(Placed)
_pieces: msgspec.msgpack.Decoder[_Piece] = msgspec.msgpack.Decoder(_Piece)


def is_name(*texts: str) -> bool:
    """Whether a store can look for these ids or tenants: half a surrogate pair is in no store."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True


def pack(entry: Entry) -> bytes:
    """What an entry says beyond the ids it names; raises Unpackable."""
    if not is_name(entry.id):
        raise Unpackable("its id is no text")
    match entry:
        case Began(begun):
            _check_number(begun.record.created_at, begun.epoch)
            return _packed(begun)
        case Read(_, placed):
            return _packed(placed)
        case Said(_, seq, ids, deltas):
            return _packed(_Piece(seq, ids, deltas))
        case Ended(response):
            _check_number(response.record.created_at)
            return _packed(response)
        case Dropped():
            return b""


def unpack_response(packed: bytes) -> StoredResponse:
    """Raises Damaged."""
    return _unpacked(_responses, packed)


def unpack_unfinished(opening: bytes, epoch: int, placed: bytes | None, pieces: Iterable[bytes]) -> Unfinished:
    """What a router was answering, from the parts that its entries have left; raises Damaged, at a gap as well."""
    begun = _unpacked(_openings, opening)
    ids, deltas = list(begun.ids), list(begun.deltas)
    for packed in pieces:
        piece = _unpacked(_pieces, packed)
        if piece.seq != len(ids):
            raise Damaged(f"what follows position {len(ids)} is missing")
        ids += piece.ids
        deltas += piece.deltas
    where = _unpacked(_placings, placed) if placed else begun.placed
    return msgspec.structs.replace(begun, epoch=epoch, placed=where, ids=ids, deltas=deltas)


def _packed(value: msgspec.Struct) -> bytes:
    try:
        packed = _encoder.encode(value)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError, TypeError) as error:
        raise Unpackable(str(error)) from error
    if len(packed) > MAX_BYTES:
        raise Unpackable(f"{len(packed)} bytes are more than {MAX_BYTES}")
    return packed


def _unpacked(decoder: msgspec.msgpack.Decoder[T], packed: bytes) -> T:
    try:
        return decoder.decode(packed)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Damaged(str(error)) from error


def _check_number(*numbers: int) -> None:
    if not all(-(2**52) < number < 2**52 for number in numbers):
        raise Unpackable("its time or its epoch is no number that a store can hold")
