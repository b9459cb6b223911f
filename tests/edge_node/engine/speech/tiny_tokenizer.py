"""A byte-level tokenizer of 256 bytes, a few merges and three special tokens, as tokenizer.json."""

from __future__ import annotations

import json

from core.manifest import Manifest
from edge_node.engine.speech import ChatTemplateSpeech
from edge_node.engine.speech.detokeniser import printable_bytes
from tests.fakes import fake_manifest

SPECIAL = ("<|end|>", "<|start|>", "<|other|>")
END, START, OTHER = range(3)
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}:{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
)
_SPELLED = {byte: character for character, byte in printable_bytes().items()}


def tokenizer_json() -> str:
    """Special tokens have ids 0 to 2, byte b has id b + 3, then come merges."""
    words = [*SPECIAL, *(_SPELLED[byte] for byte in range(256))]
    merges = [("a", "b"), ("ab", "c"), (_SPELLED[0xF0], _SPELLED[0x9F])]
    words += [left + right for left, right in merges]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                {"id": token, "content": content, "special": True, "normalized": False}
                | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
                for token, content in enumerate(SPECIAL)
            ],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "vocab": {word: token for token, word in enumerate(words)}, "merges": merges},
        }
    )


def ids_of_bytes(data: bytes) -> list[int]:
    """One id a byte, no merges."""
    return [byte + 3 for byte in data]


def tiny_manifest() -> Manifest:
    return fake_manifest("tiny@000000000000")  # its stop id, 0, is <|end|>


def tiny_speech(template: str = TEMPLATE) -> ChatTemplateSpeech:
    return ChatTemplateSpeech.from_files(tiny_manifest(), tokenizer_json(), template)
