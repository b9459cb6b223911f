"""JSON that came with a checkpoint: decoded into a type, or refused by the file's name. Does not know files."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from export.errors import SourceError

T = TypeVar("T")

_LONGEST_SHOWN = 120


def decode_json(data: bytes, kind: type[T], where: str) -> T:
    """The value; raises SourceError naming `where` for anything that is no JSON or not of that type."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise SourceError(f"{where} cannot be read ({_reason(error)}); correct it there, or fetch it again.") from error


def _reason(error: Exception) -> str:
    """The library's words, a key in front of them rather than as a path behind."""
    words, _, path = str(error).partition(" - at `$")
    key = path.removesuffix("`").removeprefix(".")
    return f"{key}: {words}" if key else words


def shown(name: object) -> str:
    """A name out of a file as a message may print it: quoted, escaped, of bounded length."""
    text = repr(name)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
