"""gpt-oss speech over the tiny and the genuine vocabulary, and streams of ids written as text."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from core.conversation import Item
from core.frames import Arguments, Delta, ItemEnd, ItemStart, Text
from core.stream import output_items
from edge_node.engine.speech.harmony import HarmonySpeech
from tests.fakes import fake_manifest
from tests.tools.gpt_oss_tokenizer import write_tiny

RELEASE = "gpt-oss@000000000000"
_SPECIAL = re.compile(r"(<\|[a-z]+\|>)")


class Vocabulary:
    """A speech, and the ids of texts in its vocabulary."""

    def __init__(self, tokenizer_json: str) -> None:
        manifest = msgspec.structs.replace(fake_manifest(RELEASE), stop_ids=[])
        self.speech = HarmonySpeech.from_files(manifest, tokenizer_json)

    def ids(self, text: str) -> list[int]:
        """Special tokens in the text are special."""
        special = self.speech.special
        pieces = (piece for piece in _SPECIAL.split(text) if piece)
        return [token for piece in pieces for token in ([special[piece]] if piece in special else self.encode(piece))]

    def encode(self, text: str) -> list[int]:
        """Special tokens in the text are text."""
        return self.speech.encode(text)

    def id(self, text: str) -> int:
        """Of a text that is one token."""
        (token,) = self.ids(text)
        return token

    def text(self, ids: list[int]) -> str:
        """Special tokens spelled out, what is no UTF-8 replaced."""
        return b"".join(self.speech.table[token] for token in ids).decode("utf-8", "replace")

    def hear(self, ids: list[int], stop: tuple[str, ...] = ()) -> list[list[Delta]]:
        """What each id makes the model say; there may be more to come."""
        parser = self.speech.start(stop)
        return [parser.push(token) for token in ids]


@cache
def tiny() -> Vocabulary:
    """Bytes and a few merges; its special ids are others than the genuine ones."""
    with TemporaryDirectory() as folder:
        write_tiny(Path(folder), first_special=400)
        return Vocabulary((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))


@cache
def genuine(tokenizer_json: Path) -> Vocabulary:
    return Vocabulary(tokenizer_json.read_text(encoding="utf-8"))


def joined(deltas: list[list[Delta]]) -> list[tuple[str, str, str, str]]:
    """The items as (kind, phase, name, text); an item that is still open counts."""
    items: list[tuple[str, str, str, str]] = []
    for delta in (delta for said in deltas for delta in said):
        match delta:
            case ItemStart(kind, phase, name):
                items.append((kind, phase, name, ""))
            case Text(text) | Arguments(text):
                items[-1] = (*items[-1][:3], items[-1][3] + text)
    return items


def stored(ids: list[int], deltas: list[list[Delta]], release: str = RELEASE) -> list[Item]:
    """The items of an answer as the router keeps them, with the ids that made each."""
    return output_items("resp_a_b", release, ids, deltas)


def check_one_text_an_id(deltas: list[list[Delta]]) -> None:
    """core/stream's rule, and items that open and close in turn."""
    is_open: ItemStart | None = None
    for said in deltas:
        assert sum(isinstance(delta, Text | Arguments) for delta in said) <= 1
        for delta in said:
            match delta:
                case ItemStart():
                    assert is_open is None
                    is_open = delta
                case ItemEnd():
                    assert is_open is not None
                    is_open = None
                case Text(text):
                    assert text and is_open is not None and is_open.kind != "function_call"
                case Arguments(text):
                    assert text and is_open is not None and is_open.kind == "function_call"
