"""What a gpt-oss whose weights are noise is made to say: frames, headers and JSON are given, the words are its own.

An answer's seed names its kind, so that a client which sets the seed chooses what it will get. Knows ids only
through a speech; does not know models, engines or clients.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_node.engine.speech import HarmonySpeech


class Noise(Enum):
    """Where the model chooses, and among what."""

    TEXT = auto()  # any id that text becomes, halves of characters too
    STRING = auto()  # ids that may stand in a JSON string as they are


Part: TypeAlias = str | tuple[Noise, int]
Line: TypeAlias = list[int | Noise]

_THOUGHT: tuple[Part, ...] = ("<|channel|>analysis<|message|>", (Noise.TEXT, 20), "<|end|><|start|>assistant")

KINDS: dict[str, tuple[Part, ...]] = {
    "answer": (*_THOUGHT, "<|channel|>final<|message|>", (Noise.TEXT, 16), "<|return|>"),
    "bare answer": ("<|channel|>final<|message|>", (Noise.TEXT, 12), "<|return|>"),
    "call": (
        *_THOUGHT,
        '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"place":"',
        (Noise.STRING, 5),
        '"}<|call|>',
    ),
    # The recipient in the other place that the format knows, and a word to the user before.
    "call after preamble": (
        *_THOUGHT,
        "<|channel|>commentary<|message|>",
        (Noise.TEXT, 8),
        '<|end|><|start|>assistant to=functions.tide<|channel|>commentary <|constrain|>json<|message|>{"harbour":"',
        (Noise.STRING, 4),
        '","days":3}<|call|>',
    ),
}
_NAMES = tuple(KINDS)
_SPECIAL = re.compile(r"(<\|[a-z]+\|>)")
_STRING_BYTES = frozenset(range(0x20, 0x7F)) - frozenset(b'"\\')


def seed_of(kind: str, turn: int) -> int:
    """A seed whose answer is of this kind; another turn's noise is another."""
    return turn * len(_NAMES) + _NAMES.index(kind)


@dataclass(frozen=True)
class Script:
    """All answers in one vocabulary."""

    speech: HarmonySpeech

    def line(self, seed: int) -> Line:
        """What stands at each position of the answer with this seed; the longer the later its turn, up to a point."""
        turn, kind = divmod(seed, len(_NAMES))
        line: Line = []
        for part in KINDS[_NAMES[kind]]:
            line += self._given(part) if isinstance(part, str) else [part[0]] * (part[1] + turn % 5)
        return line

    def choices(self, tokenizer_size: int) -> dict[Noise, NDArray[np.bool_]]:
        """Which ids each kind of noise may be."""
        table, special = self.speech.table, set(self.speech.special.values())
        text = [bool(said) and token not in special for token, said in enumerate(table[:tokenizer_size])]
        string = [plain and _STRING_BYTES.issuperset(said) for plain, said in zip(text, table, strict=False)]
        missing = [False] * (tokenizer_size - len(text))
        return {Noise.TEXT: np.array(text + missing), Noise.STRING: np.array(string + missing)}

    def _given(self, text: str) -> list[int]:
        special = self.speech.special
        pieces = [piece for piece in _SPECIAL.split(text) if piece]
        return [
            token for piece in pieces for token in ([special[piece]] if piece in special else self.speech.encode(piece))
        ]


@cache
def line_of(script: Script, seed: int) -> tuple[int | Noise, ...]:
    """`Script.line`, remembered: a sampler asks once per id."""
    return tuple(script.line(seed))
