"""What gpt-oss says, id by id: items with their texts, out of a stream of tokens.

    HEADER    <|channel|>analysis          nothing is said yet
    CONTENT   <|message|>Let me see        only <|end|>, <|call|> and <|return|> are not text
    BETWEEN   <|end|>                      a header should come
    LOOSE     Let me see                   text where a header should be, until <|start|> or <|message|>

Nothing that the model writes is an error, and none of its tokens is lost: a header that is understood is what it
says, everything else is text as it stands, special tokens spelled out. What leaves no trace: terminators that end
nothing, and a header that the limit of output ids cut off after its first special token.

Does not know the tokenizer library, nor what an item becomes for a client.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from enum import Enum, auto

from core.frames import Arguments, Delta, ItemEnd, ItemStart, Text
from edge_node.engine.speech.harmony_format import (
    ASSISTANT,
    CHANNEL,
    MESSAGE,
    START,
    Marks,
    item_of,
    may_become_header,
    read_header,
)
from edge_node.engine.speech.stop_strings import StopStrings

_START, _CHANNEL, _MESSAGE = START.encode(), CHANNEL.encode(), MESSAGE.encode()


class _Place(Enum):
    HEADER = auto()
    CONTENT = auto()
    BETWEEN = auto()
    LOOSE = auto()


class HarmonyParser:
    """Hears one response, from right after the prompt's `<|start|>assistant`.

    Invariants: an item is open in CONTENT and LOOSE and nowhere else; an id gives at most one Text or Arguments.
    """

    def __init__(self, marks: Marks, table: list[bytes], stop_ids: frozenset[int], stop: Sequence[str] = ()) -> None:
        """table: each id's bytes, special tokens spelled out. stop_ids: those that end the whole response."""
        self._marks = marks
        self._table = table
        self._stop_ids = stop_ids
        self._stop = stop
        self._place = _Place.HEADER
        self._header = b""
        self._item: _OpenItem | None = None
        self._ended = False
        self._cut = False
        self._reasoning_tokens = 0

    @property
    def stopped(self) -> bool:
        """An id that ends the response was heard, or a stop string in what it answers."""
        return self._ended or self._cut

    @property
    def reasoning_tokens(self) -> int:
        """How many ids were content of reasoning."""
        return self._reasoning_tokens

    @property
    def answering(self) -> bool:
        """Whether the next id comes in the content of a message that answers.

        Not where words of a header that was none are part of the text: no format holds that began amid a text.
        """
        return self._item is not None and self._item.answers and self._item.framed and not self.stopped

    def push(self, token: int, last: bool = False) -> list[Delta]:
        """What this id makes the model say; nothing after a stop string."""
        if self._cut:
            return []
        if token in self._stop_ids or token == self._marks.end:
            return self._terminator(token)
        match self._place:
            case _Place.CONTENT:
                return self._content(token, last)
            case _Place.HEADER:
                return self._head(token, last)
            case _Place.BETWEEN:
                return self._between(token, last)
            case _Place.LOOSE:
                return self._loose(token, last)

    # -- a token, by the place where it comes -----------------------------------------------

    def _terminator(self, token: int) -> list[Delta]:
        said = self._give_up(ends=True) if self._place is _Place.HEADER else self._say(b"", ends=True)
        self._place = _Place.BETWEEN
        self._ended = self._ended or token in self._stop_ids
        return said

    def _content(self, token: int, last: bool) -> list[Delta]:
        if self._item is not None and self._item.start.kind == "reasoning":
            self._reasoning_tokens += 1
        return self._say(self._bytes(token), last)

    def _head(self, token: int, last: bool) -> list[Delta]:
        if token == self._marks.start:
            said = self._give_up(ends=True)
            self._begin(_START)
            return said
        if token == self._marks.message:
            return self._enter(last)
        self._header += self._bytes(token)
        begun = self._header.startswith((_START, _CHANNEL))
        if may_become_header(self._words()) and (begun or not last):
            return []
        self._place = _Place.LOOSE
        return self._give_up(last=last)

    def _enter(self, last: bool) -> list[Delta]:
        """`<|message|>`: the header is complete, understood or not."""
        header = read_header(self._words(), role="" if self._header.startswith(_START) else ASSISTANT)
        self._place = _Place.CONTENT
        if header is None:
            self._header += _MESSAGE
            return self._give_up(last=last)
        self._header = b""
        return self._open(item_of(header), framed=True)

    def _between(self, token: int, last: bool) -> list[Delta]:
        if token == self._marks.start:
            return self._begin(_START)
        if token == self._marks.channel:  # the model left out `<|start|>assistant`
            return self._begin(_CHANNEL)
        self._place = _Place.CONTENT if token == self._marks.message else _Place.LOOSE
        return [*self._open(ItemStart("message")), *self._say(self._bytes(token), last)]

    def _loose(self, token: int, last: bool) -> list[Delta]:
        if token == self._marks.start:
            return [*self._say(b"", ends=True), *self._begin(_START)]
        if token == self._marks.message:
            self._place = _Place.CONTENT
        return self._say(self._bytes(token), last)

    # -- what that makes the model say ------------------------------------------------------

    def _begin(self, header: bytes) -> list[Delta]:
        self._place, self._header = _Place.HEADER, header
        return []

    def _give_up(self, ends: bool = False, last: bool = False) -> list[Delta]:
        """The header is none: its text is a message."""
        heard, self._header = self._header, b""
        return [*self._open(ItemStart("message")), *self._say(heard, last, ends)] if heard else []

    def _open(self, start: ItemStart, framed: bool = False) -> list[Delta]:
        self._item = _OpenItem(start, framed, self._stop)
        return [start]

    def _say(self, heard: bytes, last: bool = False, ends: bool = False) -> list[Delta]:
        """More of the open item, and with `ends` its end; nothing where none is open."""
        item = self._item
        if item is None:
            return []
        text = item.hear(heard, last, ends)
        said: list[Delta] = []
        if text:
            said.append(Arguments(text) if item.start.kind == "function_call" else Text(text))
        if ends:
            said.append(ItemEnd())
            self._item = None
        self._cut = item.cut
        return said

    def _words(self) -> str:
        return self._header.removeprefix(_START).decode("utf-8", "replace")

    def _bytes(self, token: int) -> bytes:
        return self._table[token] if 0 <= token < len(self._table) else b""


class _OpenItem:
    """The text of an item that is being said. Stop strings are looked for in what is said to the user at the end."""

    def __init__(self, start: ItemStart, framed: bool, stop: Sequence[str]) -> None:
        """framed: a header was understood, so that all of the text is content."""
        self.start = start
        self.framed = framed
        self.answers = start.kind == "message" and start.phase != "commentary"
        self._stops = StopStrings(stop if self.answers else ())
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def cut(self) -> bool:
        return self._stops.found

    def hear(self, heard: bytes, last: bool, ends: bool) -> str:
        """The text that this completes. A character that breaks off is shown as one when the item ends, and not
        at all when only the limit of output ids came.
        """
        text = self._stops.push(self._decoder.decode(heard, ends))
        return text + self._stops.flush() if last or ends else text
