"""The letters that stand for bytes in byte-level BPE vocabularies (GPT-2's table)."""

from __future__ import annotations


def _letters() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


#: Letter of each byte value, 0 to 255.
BYTE_LETTERS = _letters()
