"""The harmony format's special tokens, and the headers that stand before each message.

    <|start|>assistant<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"q":1}<|call|>
             |---------------------- header ------------------------|

A header is a few words in any order: role, channel, recipient, content type. The order is free because
the model itself writes the recipient in either place. Source: openai/harmony, docs/format.md.
Does not know ids beyond the special tokens', nor what a message says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from core.errors import ReleaseError
from core.frames import ItemStart

START = "<|start|>"
MESSAGE = "<|message|>"
CHANNEL = "<|channel|>"
CONSTRAIN = "<|constrain|>"
END = "<|end|>"
CALL = "<|call|>"
RETURN = "<|return|>"

ASSISTANT = "assistant"
ANALYSIS = "analysis"
COMMENTARY = "commentary"
FINAL = "final"
CHANNELS = (ANALYSIS, COMMENTARY, FINAL)
FUNCTIONS = "functions."

MAX_HEADER_CHARACTERS = 512
"""Longer than any header with a function's name; what is longer is text."""

_EVERYBODY = ("all", "user")
_MARKS = re.compile(re.escape(CHANNEL) + "|" + re.escape(CONSTRAIN))


@dataclass(frozen=True, slots=True)
class Marks:
    """The ids of the special tokens, which differ between vocabularies."""

    start: int
    message: int
    channel: int
    constrain: int
    end: int
    call: int
    return_: int

    @classmethod
    def of(cls, ids: Mapping[str, int]) -> Marks:
        """Looked up by their texts; raises ReleaseError for a vocabulary without one of them."""
        texts = (START, MESSAGE, CHANNEL, CONSTRAIN, END, CALL, RETURN)
        missing = [text for text in texts if text not in ids]
        if missing:
            raise ReleaseError(
                f"The release says it speaks harmony, but its tokenizer has no {missing[0]}; export the model again."
            )
        return cls(*(ids[text] for text in texts))


@dataclass(frozen=True, slots=True)
class Header:
    """What the words of a header said so far. awaits: the mark whose word has not come yet."""

    role: str = ""
    channel: str = ""
    recipient: str = ""
    content_type: str = ""
    awaits: str = ""


def read_header(text: str, role: str = "") -> Header | None:
    """The header between `<|start|>` and `<|message|>`, special tokens spelled out; None if it is none.

    role: who speaks if the text does not say.
    """
    header = _read(_words(text)) if len(text) <= MAX_HEADER_CHARACTERS else None
    if header is None or header.awaits or not (header.role or role):
        return None
    return header if header.role else replace(header, role=role)


def may_become_header(text: str) -> bool:
    """Whether more text can make a header of this beginning of one."""
    if len(text) > MAX_HEADER_CHARACTERS:
        return False
    words = _words(text)
    unfinished = words.pop() if words and not text[-1].isspace() and words[-1] not in (CHANNEL, CONSTRAIN) else ""
    header = _read(words)
    return header is not None and _may_begin(header, unfinished)


def item_of(header: Header) -> ItemStart:
    """The output item that a message with this header is.

    A recipient decides before the channel does. Calls of tools that are no functions (the model was trained
    with a browser and an interpreter, which nobody offers it here) are shown as commentary.
    """
    recipient = "" if header.recipient in _EVERYBODY else header.recipient
    if recipient.startswith(FUNCTIONS) and recipient != FUNCTIONS:
        return ItemStart("function_call", name=recipient.removeprefix(FUNCTIONS))
    if recipient:
        return ItemStart("message", "commentary")
    match header.channel:
        case "analysis":
            return ItemStart("reasoning")
        case "commentary":
            return ItemStart("message", "commentary")
        case "final":
            return ItemStart("message", "final_answer")
        case _:
            return ItemStart("message")


def _words(text: str) -> list[str]:
    """Marks are words of their own, wherever they stand."""
    return _MARKS.sub(r" \g<0> ", text).split()


def _read(words: list[str]) -> Header | None:
    header: Header | None = Header()
    for word in words:
        if header is None:
            return None
        header = _with(header, word)
    return header


def _with(header: Header, word: str) -> Header | None:
    """The header and one more word, None if that cannot stand there."""
    if header.awaits == CHANNEL:
        return replace(header, channel=word, awaits="") if word in CHANNELS else None
    if word == CHANNEL:
        return replace(header, awaits=CHANNEL) if not header.channel and not header.awaits else None
    if word == CONSTRAIN:
        return replace(header, awaits=CONSTRAIN) if not header.content_type and not header.awaits else None
    if "<|" in word:
        return None
    if header.awaits == CONSTRAIN:
        return replace(header, content_type=word, awaits="")
    if word == ASSISTANT and not header.role:
        return replace(header, role=word)
    if word.startswith("to="):
        return replace(header, recipient=word[3:]) if word != "to=" and not header.recipient else None
    if word.startswith(FUNCTIONS) and header.channel and not header.recipient:
        return replace(header, recipient=word)
    # `<|channel|>analysis code`: a content type without its mark, but never before anything is known.
    known = bool(header.channel or header.recipient)
    return replace(header, content_type=word) if known and not header.content_type else None


def _may_begin(header: Header, beginning: str) -> bool:
    """Whether a word that begins so may follow."""
    if header.awaits == CHANNEL:
        return any(channel.startswith(beginning) for channel in CHANNELS)
    return (
        not beginning
        or _with(header, beginning) is not None
        or (not header.role and ASSISTANT.startswith(beginning))
        or (not header.recipient and "to=".startswith(beginning))
    )
