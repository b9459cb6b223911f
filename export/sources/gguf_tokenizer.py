"""`tokenizer.json` (Hugging Face tokenizers) from a GGUF's own arrays.

Written as plain data, so that the same GGUF gives the same bytes under any library version: the release id is a
digest over them. Two kinds (tokenizer.ggml.model):

    gpt2     byte-level BPE with the file's merges; tokenizer.ggml.pre names the rule that splits text before it
    llama    SentencePiece's BPE: spaces are "▁", each text begins with one, what has no token becomes bytes;
             the scores say what is merged first

An unknown kind or rule is refused rather than guessed, since a wrong split changes ids silently. Sources: llama.cpp's
llama-vocab.cpp; where it approximates a model's own regular expression, that expression as published.
Does not know files, templates or stop ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np

from export.errors import SourceError
from export.sources.gguf_header import Metadata, shown_value, single

PREFIX = "tokenizer.ggml."
_SPACE = "▁"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
#: SentencePiece makes tokens of at most 16 characters by itself.
_LONGEST_TOKEN = 256


class TokenKind(IntEnum):
    """llama.cpp's token types."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


#: Matched as a whole wherever they stand in a text.
_WHOLE = (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their kinds (see TokenKind) by id; `where` names the file in errors."""

    tokens: list[str]
    kinds: list[int]
    where: str

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids by token."""
        return {token: index for index, token in enumerate(self.tokens)}

    def damaged(self, reason: str) -> SourceError:
        """An error about this vocabulary."""
        return SourceError(f"The tokenizer of {self.where} {reason}; take another file of this model.")


def tokenizer_json(metadata: Metadata, vocabulary: Vocabulary) -> bytes:
    """The file's bytes; raises SourceError for an unknown kind or rule, or a part that does not fit."""
    if len(vocabulary.ids) != len(vocabulary.tokens):
        raise vocabulary.damaged("lists a token twice")
    match single(metadata, PREFIX + "model", vocabulary.where):
        case "gpt2":
            document = _byte_level(metadata, vocabulary)
        case "llama":
            document = _sentencepiece(metadata, vocabulary)
        case other:
            raise SourceError(
                f"The tokenizer of {vocabulary.where} is of the kind {shown_value(other)}; this exporter knows "
                "'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)."
            )
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def strings(metadata: Metadata, key: str, where: str) -> list[str]:
    """An array of texts; raises SourceError if it is missing or empty."""
    values = metadata.get(key)
    if not isinstance(values, list) or not values:
        raise SourceError(f"{where} has no {key!r}, so no whole tokenizer; take another file of this model.")
    return values


def _byte_level(metadata: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    rule = single(metadata, PREFIX + "pre", vocabulary.where)
    splitting = _SPLITTINGS.get(rule) if isinstance(rule, str) else None
    if splitting is None:
        raise SourceError(
            f"The tokenizer of {vocabulary.where} splits text in the manner {shown_value(rule)}; this exporter knows "
            f"{', '.join(_SPLITTINGS)}."
        )
    return _document(
        vocabulary,
        normalizer=splitting.normalizer,
        pre_tokenizer={"type": "Sequence", "pretokenizers": splitting.steps},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model={"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": splitting.ignore_merges},
        merges=_listed_merges(metadata, vocabulary),
    )


def _sentencepiece(metadata: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    has_prefix = _has_prefix(metadata, vocabulary)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if has_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    if not {*_BYTES} <= vocabulary.ids.keys():
        raise vocabulary.damaged("has not a token for each byte")
    return _document(
        vocabulary,
        normalizer={"type": "Sequence", "normalizers": [*prefix, spaces]},
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        model={"unk_token": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False},
        merges=_scored_merges(metadata, vocabulary),
    )


def _has_prefix(metadata: Metadata, vocabulary: Vocabulary) -> bool:
    stated = single(metadata, PREFIX + "add_space_prefix", vocabulary.where)
    if stated is not None and not isinstance(stated, bool):
        raise vocabulary.damaged(f"has add_space_prefix = {shown_value(stated)}, neither true nor false")
    return stated is not False


def _document(
    vocabulary: Vocabulary,
    *,
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    model: dict[str, Any],
    merges: list[list[str]],
) -> dict[str, Any]:
    """In the order in which the library writes it, which the digest depends on."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model["unk_token"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": model["fuse_unk"],
            "byte_fallback": model["byte_fallback"],
            "ignore_merges": model["ignore_merges"],
            "vocab": vocabulary.ids,
            "merges": merges,
        },
    }


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
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
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind in _WHOLE
    ]


def _listed_merges(metadata: Metadata, vocabulary: Vocabulary) -> list[list[str]]:
    known = vocabulary.ids.keys()
    merges: list[list[str]] = []
    for line in strings(metadata, PREFIX + "merges", vocabulary.where):
        pair = line.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= known:
            raise vocabulary.damaged(f"has a merge {line!r:.80} that does not join two of its tokens")
        merges.append(pair)
    return merges


def _scored_merges(metadata: Metadata, vocabulary: Vocabulary) -> list[list[str]]:
    """Every way to make a normal token of two others, best score first; of one score, the longest left part first.

    A control token can so never come of merging ordinary text. SentencePiece takes the leftmost of pairs that have
    one score. Merges by rank cannot, save for runs of one character (Llama's spaces): there it is the longest left
    part that stands leftmost. Other vocabularies with equal scores are refused.
    """
    scores = _scores(metadata, vocabulary)
    merges = [
        (score, size, [token[:size], token[size:]])
        for token, score in scores.items()
        for size in range(1, len(token))
        if token[:size] in scores and token[size:] in scores
    ]
    first: dict[float, str] = {}
    for token in ("".join(pair) for _, _, pair in merges):
        other = first.setdefault(scores[token], token)
        if token != other and len({*token, *other}) > 1:
            raise vocabulary.damaged(f"gives {token!r:.40} and {other!r:.40} one score: which is merged first?")
    merges.sort(key=lambda merge: merge[:2], reverse=True)
    return [pair for _, _, pair in merges]


def _scores(metadata: Metadata, vocabulary: Vocabulary) -> Mapping[str, float]:
    """Scores of the normal tokens."""
    scores = metadata.get(PREFIX + "scores")
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or len(scores) != len(vocabulary.tokens):
        raise vocabulary.damaged(f"does not give a score for each of its {len(vocabulary.tokens)} tokens")
    normal: dict[str, float] = {}
    for token, kind, score in zip(vocabulary.tokens, vocabulary.kinds, scores.tolist(), strict=True):
        if len(token) > _LONGEST_TOKEN or not isfinite(score):
            raise vocabulary.damaged(f"has a token of {len(token)} characters with the score {score}")
        if kind == TokenKind.NORMAL:
            normal[token] = score
    return normal


@dataclass(frozen=True)
class _Splitting:
    """What happens to text before byte-level BPE. ignore_merges: a piece that is a token needs no merges."""

    steps: list[dict[str, Any]]
    ignore_merges: bool = False
    normalizer: dict[str, Any] | None = None


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> dict[str, Any]:
    """Bytes as letters; `use_regex`: after splitting as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _words(digits: str) -> str:
    """The pattern of Llama 3 and Qwen 2, which differ in how many digits stand together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_3 = _Splitting([_split(_words(r"\p{N}{1,3}")), _bytes(False)], ignore_merges=True)
#: By llama.cpp's names. `default`: what it does for files whose rule the converter did not know.
_SPLITTINGS: Mapping[str, _Splitting] = {
    "smollm": _Splitting([{"type": "Digits", "individual_digits": True}, _bytes(True)]),
    "gpt-2": _Splitting([_bytes(True)]),
    "default": _Splitting(
        [*map(_split, (r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", "[0-9][0-9][0-9]")), _bytes(False)]
    ),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "qwen2": _Splitting([_split(_words(r"\p{N}")), _bytes(False)], normalizer={"type": "NFC"}),
}
