"""How a model family says things: conversations to prompt ids, output ids to deltas.

Parsers hold no state that cannot be rebuilt by pushing the same ids again; that is how a stream moves
to another node. Does not know sequences, slots or frames other than deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from core.conversation import Item
from core.errors import ReleaseError
from core.frames import Delta
from core.manifest import Manifest
from edge_node.engine.speech.chat_template import ChatTemplateSpeech, SpeechError
from edge_node.engine.speech.harmony import HarmonySpeech
from edge_node.engine.speech.rendered import Rendered
from edge_node.engine.speech.setting import PLAIN, Setting

__all__ = [
    "PLAIN",
    "ChatTemplateSpeech",
    "HarmonySpeech",
    "Parser",
    "Rendered",
    "Setting",
    "Speech",
    "SpeechError",
    "open_speech",
]


def open_speech(manifest: Manifest, read_text: Callable[[str], str]) -> Speech:
    """The speech that a manifest names, from its release's files; raises ReleaseError."""
    tokenizer = read_text(manifest.tokenizer)
    match manifest.speech:
        case "harmony":
            return HarmonySpeech.from_files(manifest, tokenizer)
        case "chat_template":
            if manifest.chat_template is None:
                raise ReleaseError(f"{manifest.release} names no chat template; export the model again.")
            return ChatTemplateSpeech.from_files(manifest, tokenizer, read_text(manifest.chat_template))


class Parser(Protocol):
    """Hears one response, id by id; `stopped` once it has heard its end."""

    @property
    def stopped(self) -> bool: ...

    @property
    def reasoning_tokens(self) -> int:
        """How many of the ids so far were reasoning."""
        ...

    @property
    def answering(self) -> bool:
        """Whether the next id would be text of the answer itself: where a format can be enforced."""
        ...

    def push(self, token: int, last: bool = False) -> list[Delta]:
        """What this id makes the model say. last: no further id will come, so hold nothing back."""
        ...


class Speech(Protocol):
    """One model family's way of speaking."""

    @property
    def closing_ids(self) -> frozenset[int]:
        """The ids that may end a complete answer."""
        ...

    def lay_out(self, items: list[Item], release: str, setting: Setting = PLAIN) -> Rendered:
        """Prompt ids, up to where the answer begins, and at which of them each item ends; raises SpeechError."""
        ...

    def bytes_of(self, token: int) -> bytes:
        """What an id stands for in the text, special tokens spelled out; b"" for one that is not known."""
        ...

    def least_tokens(self, items: list[Item], release: str, setting: Setting = PLAIN) -> int:
        """A number of ids that a prompt cannot stay below, found without encoding anything."""
        ...

    def start(self, stop: Sequence[str] = ()) -> Parser:
        """A parser for a new response that also ends at any of these strings."""
        ...
