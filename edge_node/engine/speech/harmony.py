"""Models that speak harmony, OpenAI's format for gpt-oss: reasoning, preambles, calls and answers as messages.

Everything comes from the release's own tokenizer, special tokens by their texts; no network, no clock. Written to
the letter of openai-harmony 0.0.8, which the tests compare with; where the two differ on purpose, the
module that does it says so. Does not know where the tokenizer's file came from.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from tokenizers import Tokenizer

from core.conversation import Item
from core.errors import ReleaseError
from core.manifest import Manifest
from edge_node.engine.speech.detokeniser import byte_table
from edge_node.engine.speech.encoding import TextEncoder
from edge_node.engine.speech.harmony_format import Marks
from edge_node.engine.speech.harmony_history import opening_instructions, said_again
from edge_node.engine.speech.harmony_parse import HarmonyParser
from edge_node.engine.speech.harmony_prompt import developer_text
from edge_node.engine.speech.harmony_render import Renderer
from edge_node.engine.speech.rendered import Rendered
from edge_node.engine.speech.setting import PLAIN, Setting


class HarmonySpeech:
    """Speech of a release whose manifest says `harmony`.

    table: each id's bytes, special tokens spelled out. special: the ids of the special tokens.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, table: list[bytes], special: dict[str, int]) -> None:
        """tokenizer: one that takes special tokens in texts for text."""
        self.table = table
        self.special = special
        self._tokenizer = tokenizer
        self._encode = TextEncoder(tokenizer)
        self._marks = marks = Marks.of(special)
        self._longest_bytes = max(map(len, table), default=0) or 1
        # <|end|> ends a message, never the response, whatever the checkpoint lists.
        self._stop_ids = frozenset({*manifest.stop_ids, marks.call, marks.return_} - {marks.end})
        self._renderer = Renderer(marks, self.encode, table, special.values())

    @classmethod
    def from_files(cls, manifest: Manifest, tokenizer_json: str) -> HarmonySpeech:
        """From the contents of the release's file; raises ReleaseError."""
        try:
            tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise ReleaseError(f"{manifest.tokenizer} is not a tokenizer: {error}; export the model again.") from error
        tokenizer.encode_special_tokens = True
        parsed = msgspec.json.decode(tokenizer_json)
        table = byte_table(parsed)
        special = {entry["content"]: entry["id"] for entry in parsed.get("added_tokens", ()) if entry.get("special")}
        for text, token in special.items():
            table[token] = text.encode()
        return cls(manifest, tokenizer, table, special)

    @property
    def closing_ids(self) -> frozenset[int]:
        """Those that end the response, less the one that ends a call."""
        return self._stop_ids - {self._marks.call}

    def encode(self, text: str) -> list[int]:
        """Plain text: nothing in it is a special token."""
        return self._encode(text)

    def bytes_of(self, token: int) -> bytes:
        return self.table[token] if 0 <= token < len(self.table) else b""

    def lay_out(self, items: list[Item], release: str, setting: Setting = PLAIN) -> Rendered:
        """The prompt, and at which token each item ends."""
        return self._renderer.render(items, release, setting)

    def least_tokens(self, items: list[Item], release: str, setting: Setting = PLAIN) -> int:
        """No id has more bytes than the longest; a normaliser may shorten text, so then nothing is known."""
        if self._tokenizer.normalizer is not None:
            return 0
        opening = opening_instructions(items)
        said = [one[0].text for one in list(said_again(items))[opening:] if one is not None]
        texts = [developer_text([item.text for item in items[:opening]], setting), *said]
        return sum(len(text.encode()) // self._longest_bytes for text in texts)

    def start(self, stop: Sequence[str] = ()) -> HarmonyParser:
        return HarmonyParser(self._marks, self.table, self._stop_ids, stop)
