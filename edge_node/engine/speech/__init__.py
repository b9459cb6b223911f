"""How a model family says things: conversations to prompt ids, output ids to deltas.

Parsers hold no state that cannot be rebuilt by pushing the same ids again; that is how a stream moves
to another node. Does not know sequences, slots or frames other than deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from core.conversation import Item
from core.frames import Delta
from edge_node.engine.speech.chat_template import ChatTemplateSpeech, SpeechError
from edge_node.engine.speech.harmony import HarmonySpeech
from edge_node.engine.speech.harmony_render import Rendered
from edge_node.engine.speech.setting import Setting

__all__ = ["ChatTemplateSpeech", "HarmonySpeech", "Parser", "Rendered", "Setting", "Speech", "SpeechError"]


class Parser(Protocol):
    """Hears one response, id by id; `stopped` once it has heard its end."""

    @property
    def stopped(self) -> bool: ...

    def push(self, token: int, last: bool = False) -> list[Delta]:
        """What this id makes the model say. last: no further id will come, so hold nothing back."""
        ...


class Speech(Protocol):
    """One model family's way of speaking."""

    def render(self, items: list[Item], release: str) -> list[int]:
        """Prompt ids, up to where the answer begins; raises SpeechError."""
        ...

    def least_tokens(self, items: list[Item], release: str) -> int:
        """A number of ids that `render` cannot stay below, found without encoding anything."""
        ...

    def start(self, stop: Sequence[str] = ()) -> Parser:
        """A parser for a new response that also ends at any of these strings."""
        ...
