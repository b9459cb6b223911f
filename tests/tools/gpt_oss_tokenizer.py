"""Tokenizer files for synthetic GPT-OSS checkpoints: a tiny byte-level one, or the genuine vocabulary.

The genuine vocabulary comes from scripts/get-tokenizer and brings no chat template; both get the short one below,
which speaks harmony's roles and nothing else: no tools, no dates, no reasoning effort.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.export.byte_alphabet import BYTE_LETTERS
from tests.export.tiny_gguf import MERGES
from tests.tools.byte_level import SpecialToken, write_byte_level

SPACE = BYTE_LETTERS[ord(" ")]

FIRST_SPECIAL_ID = 199_998
"""Where the special tokens begin in the genuine vocabulary."""

_NAMED = {
    199_998: "<|startoftext|>",
    199_999: "<|endoftext|>",
    200_002: "<|return|>",
    200_003: "<|constrain|>",
    200_005: "<|channel|>",
    200_006: "<|start|>",
    200_007: "<|end|>",
    200_008: "<|message|>",
    200_012: "<|call|>",
    200_018: "<|endofprompt|>",
}
SPECIAL_TEXTS = tuple(_NAMED.get(index, f"<|reserved_{index}|>") for index in range(FIRST_SPECIAL_ID, 200_019))
"""The genuine vocabulary's last 21 entries, in order."""

CHAT_TEMPLATE = """\
{% for message in messages %}\
{% if message['role'] == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ message['content'] }}<|end|>\
{% else %}<|start|>{{ message['role'] }}<|message|>{{ message['content'] }}<|end|>{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""


def write_tiny(folder: Path, first_special: int) -> None:
    """256 bytes and a few merges, then numbers that no text becomes, harmony's special tokens from `first_special` on.

    Without the numbers, ids between would have no text, and the library would move the special tokens down.
    """
    tokens = BYTE_LETTERS + [merge.replace(" ", "") for merge in MERGES]
    if len(tokens) > first_special:
        raise ValueError(f"The tiny tokenizer needs {len(tokens)} ids below the special ones, not {first_special}.")
    tokens += [f"{SPACE}{index}" for index in range(len(tokens), first_special)]
    special = [SpecialToken(first_special + index, text) for index, text in enumerate(SPECIAL_TEXTS)]
    write_byte_level(folder, tokens, MERGES, special)
    _write_beside(folder)


def write_genuine(folder: Path, source: Path, first_special: int) -> None:
    """Copy the genuine vocabulary from `source`, the file whose path scripts/get-tokenizer prints."""
    if first_special != FIRST_SPECIAL_ID:
        raise ValueError(f"The genuine tokenizer's special ids begin at {FIRST_SPECIAL_ID}, not {first_special}.")
    if not source.is_file():
        raise FileNotFoundError(f"{source} is missing; run scripts/get-tokenizer.")
    shutil.copy(source, folder / "tokenizer.json")
    _write_beside(folder)


def _write_beside(folder: Path) -> None:
    config = {
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|return|>",
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 10**30,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
