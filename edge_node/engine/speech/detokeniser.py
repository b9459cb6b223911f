"""Output ids to text, never half a character.

Byte-level vocabularies spell bytes as printable characters (GPT-2's table), so a character may be
spread over several ids. Does not know items, stop ids or the tokenizer library.
"""

from __future__ import annotations

import codecs
from typing import Any

from core.errors import ReleaseError


def printable_bytes() -> dict[str, int]:
    """Character -> byte: printable bytes stand for themselves, the others follow from U+0100 (GPT-2's table)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = printable_bytes()


def byte_table(tokenizer: dict[str, Any]) -> list[bytes]:
    """The bytes of each id, from a parsed tokenizer.json; special ids have none.

    Raises ReleaseError for a vocabulary that is not byte-level.
    """
    table: dict[int, bytes] = {}
    special = {entry["id"]: bool(entry.get("special")) for entry in tokenizer.get("added_tokens", ())}
    spelled = {entry["id"]: entry["content"] for entry in tokenizer.get("added_tokens", ())}
    for text, token in tokenizer["model"]["vocab"].items():
        if token not in special:
            try:
                table[token] = bytes(_BYTE_OF[character] for character in text)
            except KeyError as error:
                raise ReleaseError(
                    f"The tokenizer spells id {token} with {error.args[0]!r}, which is not byte-level BPE; "
                    "only byte-level vocabularies are served."
                ) from error
    for token, text in spelled.items():
        table[token] = b"" if special[token] else text.encode()
    return [table.get(token, b"") for token in range(max(table, default=-1) + 1)]


class Detokeniser:
    """Joins ids into text. Invariant: what was returned so far, joined, is the decoding of all complete characters.

    Bytes that cannot begin or continue a character become U+FFFD as soon as that is certain; the
    beginning of a character that never ends is never shown.
    """

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this id completes; ids outside the table have no text."""
        return self._decoder.decode(self._table[token] if token < len(self._table) else b"")
