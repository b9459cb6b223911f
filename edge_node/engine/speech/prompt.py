"""A prompt's ids, put together part by part, as if the whole had been encoded at once.

Byte-level vocabularies encode a part as they would within the whole. SentencePiece's put a space before a text, "▁",
which only a text that really begins there may have:

    <s>[INST] Hi [/INST]    is    <s> ▁[ INST ] ▁Hi ▁[ / INST ]
    its parts, encoded apart      <s> ▁[ INST ] ▁  ▁Hi  ▁▁[ / INST ]

So a part within a stretch of text is encoded without that space, and spaces at the end of the template's words wait
for what follows them. Does not know templates or conversations.
"""

from __future__ import annotations

import re
from copy import deepcopy
from enum import Enum
from typing import Any

import msgspec
from tokenizers import Tokenizer

from edge_node.engine.speech.encoding import TextEncoder

_SPACE = "▁"


class Opening(Enum):
    """Before which texts the tokenizer puts a space."""

    NEVER = "never"
    FIRST = "first"  # the prompt's first
    ALWAYS = "always"  # every stretch between added tokens


class PromptEncoder:
    """A tokenizer in the ways that a prompt needs it; `start` begins a prompt."""

    def __init__(self, plain: Tokenizer, marked: Tokenizer, parsed: dict[str, Any], table: list[bytes]) -> None:
        """plain, marked: special tokens are text, or are recognised. parsed: their file. table: the bytes of ids."""
        added = parsed.get("added_tokens", ())
        self.marked = marked
        self.opening = _opening(parsed)
        self.encode_plain = TextEncoder(plain)
        self.encode_marked = TextEncoder(marked)
        never = self.opening is Opening.NEVER
        self.encode_inner = self.encode_plain if never else TextEncoder(_without_opening(parsed))
        self.added_ids = frozenset(entry["id"] for entry in added)
        self.in_marked = _any_of([entry["content"] for entry in added])
        self.in_plain = _any_of([entry["content"] for entry in added if not entry.get("special")])
        self._table = table
        self._longest_bytes = max(map(len, table), default=0) or 1
        self._may_shorten = not all(map(_keeps_length, _list_of(parsed, "normalizer", "normalizers")))

    def start(self) -> Prompt:
        """A prompt without any ids yet."""
        return Prompt(self, [])

    def begins_with_space(self, token: int) -> bool:
        """Ids beyond the tokenizer have no text."""
        return token < len(self._table) and self._table[token].startswith(b" ")

    def least(self, content: str) -> int:
        """A number of ids that a content cannot stay below, found without encoding it.

        No id has more bytes than the longest; a normaliser may shorten text, so then nothing is known.
        """
        spelled = content if self.opening is Opening.NEVER else content.replace(_SPACE, " ")
        return 0 if self._may_shorten else len(spelled.encode()) // self._longest_bytes


class Prompt:
    """Ids so far. `_waiting`: spaces that the next part will begin with."""

    def __init__(self, encoder: PromptEncoder, ids: list[int], waiting: str = "") -> None:
        self._encoder = encoder
        self._ids = ids
        self._waiting = waiting

    @property
    def count(self) -> int:
        """How many ids are certain: waiting spaces may yet become part of what follows them."""
        return len(self._ids)

    def ids_from(self, start: int) -> list[int]:
        """Those that are certain, from this one on."""
        return self._ids[start:]

    def branch(self) -> Prompt:
        """One that goes on as this one would, without the ids before its last."""
        return Prompt(self._encoder, self._ids[-1:], self._waiting)

    def write(self, words: str) -> None:
        """The template's own words, in which special tokens are recognised."""
        if self._encoder.opening is not Opening.NEVER:
            words = self._waiting + words
            kept = words.rstrip(" ")
            self._waiting = words[len(kept) :]
            words = kept
        self._encode(words, self._encoder.encode_marked, self._encoder.in_marked)

    def say(self, content: str) -> None:
        """A content, in which they are not."""
        if content:
            self._encode(self._waiting + content, self._encoder.encode_plain, self._encoder.in_plain)
            self._waiting = ""

    def repeat(self, ids: list[int]) -> None:
        """Ids that the model generated: a space that they begin with is the one that was waiting."""
        if ids and self._encoder.begins_with_space(ids[0]):
            self._waiting = self._waiting[:-1]
        self.finish()
        self._ids += ids

    def finish(self) -> list[int]:
        """All ids, those of waiting spaces included."""
        self._encode(self._waiting, self._encoder.encode_plain, self._encoder.in_plain)
        self._waiting = ""
        return self._ids

    def _encode(self, text: str, encode: TextEncoder, added: re.Pattern[str]) -> None:
        """A stretch that goes on has no opening space; those behind an added token in this text begin anew."""
        if self._goes_on():
            token = added.search(text)
            going_on = text[: token.start()] if token else text
            self._ids += self._encoder.encode_inner(going_on)
            text = text[len(going_on) :]
        self._ids += encode(text)

    def _goes_on(self) -> bool:
        match self._encoder.opening:
            case Opening.NEVER:
                return False
            case Opening.FIRST:
                return bool(self._ids)
            case Opening.ALWAYS:
                return bool(self._ids) and self._ids[-1] not in self._encoder.added_ids


def _opening(parsed: dict[str, Any]) -> Opening:
    for step in _steps(parsed):
        match step:
            case {"type": "Prepend"}:
                return Opening.ALWAYS
            case {"type": "Metaspace"}:
                return Opening(step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never"))
    return Opening.NEVER


def _without_opening(parsed: dict[str, Any]) -> Tokenizer:
    """The tokenizer of the file if it put no space before any text; special tokens are text."""
    changed = deepcopy({part: parsed.get(part) for part in ("normalizer", "pre_tokenizer")})
    for step in _steps(changed):
        match step:
            case {"type": "Prepend"}:
                step["prepend"] = ""
            case {"type": "Metaspace"}:
                step |= {"prepend_scheme": "never", "add_prefix_space": False}
    tokenizer = Tokenizer.from_str(msgspec.json.encode(parsed | changed).decode())
    tokenizer.encode_special_tokens = True
    return tokenizer


def _keeps_length(step: dict[str, Any]) -> bool:
    """Whether a normaliser does no more than write spaces as "▁"."""
    match step:
        case {"type": "Prepend", "prepend": "▁"} | {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            return True
        case _:
            return False


def _steps(parsed: dict[str, Any]) -> list[dict[str, Any]]:
    """What happens to a text before it is encoded."""
    return _list_of(parsed, "normalizer", "normalizers") + _list_of(parsed, "pre_tokenizer", "pretokenizers")


def _list_of(parsed: dict[str, Any], part: str, steps: str) -> list[dict[str, Any]]:
    """The steps of a part that is missing, one step or a sequence."""
    found = parsed.get(part)
    return [] if found is None else [*found.get(steps, [found])]


def _any_of(texts: list[str]) -> re.Pattern[str]:
    """Finds any of the texts; of none, nothing."""
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")
