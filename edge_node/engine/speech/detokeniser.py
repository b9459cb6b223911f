"""Output ids to text, never half a character.

Byte-level vocabularies spell bytes as printable characters (GPT-2's table), SentencePiece's spell text,
"▁" for a space and `<0xE6>` for a byte; either way a character may be spread over several ids. Does not
know items, stop ids or the tokenizer library.
"""

from __future__ import annotations

import codecs
import re
from functools import partial
from typing import Any

from core.errors import ReleaseError


def printable_bytes() -> dict[str, int]:
    """Character -> byte: printable bytes stand for themselves, the others follow from U+0100 (GPT-2's table)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = printable_bytes()
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


def byte_table(tokenizer: dict[str, Any]) -> list[bytes]:
    """The bytes of each id, from a parsed tokenizer.json; special ids have none.

    Raises ReleaseError for a vocabulary of another spelling.
    """
    replaced = _replacements(tokenizer)
    spell = _byte_level if replaced is None else partial(_piece, replaced)
    spell_added = str.encode if replaced is None else spell
    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens", ())}
    table = {token: spell(text) for text, token in tokenizer["model"]["vocab"].items() if token not in added}
    for token, entry in added.items():
        table[token] = b"" if entry.get("special") else spell_added(entry["content"])
    return [table.get(token, b"") for token in range(max(table, default=-1) + 1)]


def drops_first_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a space at the beginning of the decoded text belongs to the spelling and not to the text."""
    return any(step.get("type") == "Strip" for step in _steps(tokenizer))


def _byte_level(text: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in text)
    except KeyError as error:
        raise ReleaseError(
            f"The tokenizer spells {text!r} with {error.args[0]!r}, which is not byte-level BPE, and its decoder "
            "names no byte fallback; only vocabularies of these two kinds are served."
        ) from error


def _steps(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    """What the decoder does, in order."""
    decoder: dict[str, Any] = tokenizer.get("decoder") or {}
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    return steps


def _replacements(tokenizer: dict[str, Any]) -> list[tuple[str, str]] | None:
    """What the decoder of a vocabulary with byte fallback replaces in each id's text; None for other vocabularies.

    Raises ReleaseError for a step that acts on more than one id, but for the space that is dropped first of all.
    """
    steps = _steps(tokenizer)
    if not any(step.get("type") == "ByteFallback" for step in steps):
        return None
    replaced: list[tuple[str, str]] = []
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replaced.append((old, new))
            case {"type": "ByteFallback" | "Fuse"} | {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                pass
            case _:
                raise ReleaseError(
                    f"The tokenizer's decoder has the step {step!s:.99}, which cannot be streamed; use another release."
                )
    return replaced


def _piece(replaced: list[tuple[str, str]], text: str) -> bytes:
    for old, new in replaced:
        text = text.replace(old, new)
    byte = _BYTE_PIECE.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.encode()


class Detokeniser:
    """Joins ids into text. Invariant: what was returned so far, joined, is the decoding of all complete characters.

    Bytes that cannot begin or continue a character become U+FFFD as soon as that is certain; the
    beginning of a character that never ends is never shown. drop_first_space: see `drops_first_space`.
    """

    def __init__(self, table: list[bytes], drop_first_space: bool = False) -> None:
        self._table = table
        self._dropping = drop_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this id completes; ids outside the table have no text."""
        text = self._decoder.decode(self._table[token] if token < len(self._table) else b"")
        if self._dropping and text:
            self._dropping = False
            return text.removeprefix(" ")
        return text
