"""`tokenizer.json` (Hugging Face tokenizers), chat template and special ids, from a GGUF's own arrays.

Written as plain data, so that the same GGUF gives the same bytes under any library version: the release id is a
digest over them. Byte-level BPE only (tokenizer.ggml.model "gpt2"); what splits text before BPE is named by
tokenizer.ggml.pre, and an unknown name is refused rather than guessed, since a wrong split changes ids silently.
Token kinds: llama.cpp's `llama_token_type`. Does not know files.
"""

from __future__ import annotations

import json
from enum import IntEnum
from typing import Any, cast

import numpy as np

from export.errors import SourceError
from export.gguf_header import Metadata
from export.speech import Speech

_PREFIX = "tokenizer.ggml."
#: Texts that end a turn or a document, as llama.cpp recognises them beyond the ids that the file names.
_END_TEXTS = frozenset({"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "</s>"})


class TokenKind(IntEnum):
    """llama.cpp's token types, as far as byte-level vocabularies use them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


def read_speech(metadata: Metadata, where: str) -> Speech:
    """Everything about text; raises SourceError, naming `where`, if something is missing or of an unknown kind."""
    tokens = _strings(metadata, _PREFIX + "tokens")
    kinds = _kinds(metadata, len(tokens))
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str) or not template:
        raise SourceError("The file has no chat template; export an instruct model.")
    return Speech(
        tokenizer_json=_tokenizer_json(metadata, tokens, kinds),
        chat_template=template,
        stop_ids=_stop_ids(metadata, tokens, kinds),
        bos_id=_optional_id(metadata, "bos_token_id", len(tokens)),
        size=len(tokens),
    )


def _tokenizer_json(metadata: Metadata, tokens: list[str], kinds: list[int]) -> bytes:
    model = metadata.get(_PREFIX + "model")
    if model != "gpt2":
        raise SourceError(f"The tokenizer is of the kind {model!r}; this exporter knows byte-level BPE ('gpt2').")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise SourceError("The tokenizer lists a token twice; the file is damaged, fetch it again.")
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, kinds),
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(metadata.get(_PREFIX + "pre")),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(metadata, vocabulary),
        },
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _pre_tokenizer(kind: object) -> dict[str, Any]:
    """How text is split before BPE, by llama.cpp's name for it."""
    match kind:
        case "smollm":
            return {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                ],
            }
        case _:
            raise SourceError(f"The tokenizer splits text in the manner {kind!r}; this exporter knows 'smollm'.")


def _added_tokens(tokens: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    """Tokens that are matched as a whole before BPE; control tokens are special, user-defined ones plain text."""
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != TokenKind.USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED)
    ]


def _merges(metadata: Metadata, vocabulary: dict[str, int]) -> list[list[str]]:
    merges: list[list[str]] = []
    for line in _strings(metadata, _PREFIX + "merges"):
        pair = line.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise SourceError(f"The tokenizer's merge {line!r} does not join two of its tokens; the file is damaged.")
        merges.append(pair)
    return merges


def _stop_ids(metadata: Metadata, tokens: list[str], kinds: list[int]) -> tuple[int, ...]:
    named = [_optional_id(metadata, key, len(tokens)) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    if named[0] is None:
        raise SourceError("The file names no end-of-sequence id (tokenizer.ggml.eos_token_id); fetch it again.")
    ends = {index for index in named if index is not None}
    ends |= {i for i, token in enumerate(tokens) if token in _END_TEXTS and kinds[i] == TokenKind.CONTROL}
    return (named[0], *sorted(ends - {named[0]}))


def _optional_id(metadata: Metadata, key: str, size: int) -> int | None:
    value = metadata.get(_PREFIX + key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < size:
        raise SourceError(f"The tokenizer's {key} is {value!r}, but it has {size} tokens; the file is damaged.")
    return value


def _kinds(metadata: Metadata, size: int) -> list[int]:
    kinds = metadata.get(_PREFIX + "token_type")
    if not isinstance(kinds, np.ndarray) or len(kinds) != size:
        raise SourceError(f"The tokenizer does not give a type for each of its {size} tokens; the file is damaged.")
    return cast("list[int]", kinds.tolist())


def _strings(metadata: Metadata, key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise SourceError(f"The metadata key {key!r} is missing; the file has no whole tokenizer, fetch it again.")
    return values
