"""A model that costs nothing: the next id is a hash of everything before it, and its speech has all that is awkward.

Reasoning, messages, function calls, characters of two or three ids, ids that say nothing, items that end by the next
one's beginning, an id that ends it all. An answer has 1 to 60 ids; how many follows from the prompt and the seed.
Pure. What an undisturbed node would say is `answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

from core.conversation import Item
from core.frames import Arguments, Delta, Finish, ItemEnd, ItemStart, Text

END = 1
CLOSE = 2
SILENT = 3
STARTS = {
    4: ItemStart("reasoning"),
    5: ItemStart("message", "commentary"),
    6: ItemStart("message", "final_answer"),
    7: ItemStart("function_call", "", "look_up"),
}
HALVES = range(10, 20)
MIDDLE = 30
TAILS = range(20, 30)
WORDS = range(100, 1000)
MOST_IDS = 60

_END_OF_ITEM = ItemEnd()
_TEXTS = {token: Text(f"w{token} ") for token in WORDS}
_ARGUMENTS = {token: Arguments(f'"k{token}": {token}, ') for token in WORDS}
_MASK = (1 << 64) - 1


def mixed(state: int, value: int) -> int:
    """A hash of both; 64 bits."""
    state = ((state ^ (value + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9) & _MASK
    return state ^ (state >> 29)


class Prompt(NamedTuple):
    """digest: of what the model is shown. tokens: how long that is."""

    digest: int
    tokens: int


def read(items: Sequence[Item], dropped: int) -> Prompt:
    """What is left of a conversation without its first `dropped` items."""
    digest = 1
    for item in items[dropped:]:
        digest = mixed(digest, crc32(item.text.encode()))
    return Prompt(digest, sum(map(length_of, items[dropped:])))


def length_of(item: Item) -> int:
    return 3 + len(item.text)


def fitted(items: Sequence[Item], most: int, max_output_tokens: int, auto: bool, dropped: int = 0) -> int | None:
    """How many items are left out so that the rest has room in a context of `most` tokens; None: it never has."""
    if not auto:
        return dropped if read(items, dropped).tokens < most else None
    room = max(1, min(max_output_tokens, most // 4))
    while read(items, dropped).tokens + room > most:
        if dropped >= len(items) - 1:
            return None
        dropped += 1
    return dropped


class Speaker:
    """Hears ids and knows what they say, and which is next.

    Total: also ids that it would never have said are heard, so that a router's mistake shows as another answer.
    """

    __slots__ = ("count", "ended", "half", "kind", "length", "reasoning", "state")

    def __init__(self, prompt: Prompt, seed: int) -> None:
        self.state = mixed(prompt.digest, seed)
        self.length = 1 + self.state % MOST_IDS
        self.count = 0
        self.reasoning = 0
        self.kind = ""
        self.half = 0
        self.ended = False

    def next_id(self) -> int:
        state = self.state
        if self.count >= self.length - 1:
            return END
        if self.half:
            return MIDDLE if self.half == 1 and state % 3 == 0 else TAILS[state % 10]
        if not self.kind:
            return 4 + state % 4
        match state % 16:
            case 0:
                return CLOSE
            case 1 | 2 | 3:
                return HALVES[state % 10]
            case 4:
                return SILENT
            case 5 if state % 3 == 0:
                return 4 + state % 4
            case _:
                return WORDS[(state >> 8) % 900]

    def hear(self, token: int) -> list[Delta]:
        self.state = mixed(self.state, token)
        self.count += 1
        if self.kind == "reasoning":
            self.reasoning += 1
        if token in STARTS:
            self.kind, self.half = STARTS[token].kind, 0
            return [STARTS[token]]
        if token in (END, CLOSE):
            self.ended = token == END
            closes, self.kind, self.half = bool(self.kind), "", 0
            return [_END_OF_ITEM] if closes else []
        if token in HALVES:
            self.half = 1
            return []
        if token == MIDDLE:
            self.half = 2
            return []
        if token in TAILS:
            character = chr(0x4E00 + self.state % 5000)
            self.half = 0
            return [Arguments(character) if self.kind == "function_call" else Text(character)]
        said = _ARGUMENTS if self.kind == "function_call" else _TEXTS
        return [said[token]] if token in said else []


class Said(NamedTuple):
    """An undisturbed node's answer. reasoning_tokens: how many of the ids belong to reasoning items."""

    ids: list[int]
    deltas: list[list[Delta]]
    finish: Finish
    reasoning_tokens: int


def answer(prompt: Prompt, seed: int, most: int) -> Said:
    """All ids of an answer that may have `most` of them."""
    speaker = Speaker(prompt, seed)
    ids: list[int] = []
    deltas: list[list[Delta]] = []
    while not speaker.ended and len(ids) < most:
        ids.append(speaker.next_id())
        deltas.append(speaker.hear(ids[-1]))
    return Said(ids, deltas, "stop" if speaker.ended else "length", speaker.reasoning)
