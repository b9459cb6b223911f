"""A SentencePiece vocabulary as a GGUF has it, trained here on a few words, and SentencePiece's rule written out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from export.sources.gguf_tokenizer import TokenKind

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
USER_DEFINED = "<|turn|>"
LONGEST_RUN = 16
_TEXT = """the river rose during the night and nobody in the village slept they had moved the cows uphill had they not
it is fine we have counted you are right maybe the cafe is closed then there is nothing to be done here either aaaa
春天来了河边的柳树绿了 def return self None == == -- ---- naïve café 😀😀 <a/>"""


@cache
def _trained(count: int = 120) -> tuple[str, ...]:
    """Pieces in the order in which pairs of the text are the most frequent."""
    words = ["▁" + word for word in _TEXT.split()]
    symbols = [list(word) for word in words]
    pieces: list[str] = []
    while len(pieces) < count:
        pairs = Counter(pair for word in symbols for pair in pairwise(word))
        ((left, right), _), *_ = pairs.most_common(1)
        if left + right not in pieces:
            pieces.append(left + right)
        symbols = [_merged(word, left, right) for word in symbols]
    return tuple(pieces)


def _merged(word: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == (left, right):
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def tokens() -> dict[str, tuple[TokenKind, float]]:
    """Kind and score by token, in the order of ids; as in Llama's, runs of spaces have one lowest score."""
    made = dict.fromkeys(SPECIAL_TOKENS, (TokenKind.CONTROL, 0.0)) | {"<unk>": (TokenKind.UNKNOWN, 0.0)}
    made |= {f"<0x{byte:02X}>": (TokenKind.BYTE, 0.0) for byte in range(256)}
    made |= {"▁" * length: (TokenKind.NORMAL, -1e9) for length in range(2, LONGEST_RUN + 1)}
    made |= {piece: (TokenKind.NORMAL, -float(rank)) for rank, piece in enumerate([*_trained(), "</", "s>"])}
    letters = sorted({*_TEXT} - {" ", "\n", "柳"})  # one letter will have to be bytes
    made |= {letter: (TokenKind.NORMAL, -float(len(made) + at)) for at, letter in enumerate(["▁", *letters])}
    return made | {USER_DEFINED: (TokenKind.USER_DEFINED, -1000.0)}


def metadata(**changes: Any) -> dict[str, Any]:
    """What a file's header says, as it is read; a change to None takes a key away."""
    vocabulary = tokens()
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": list(vocabulary),
        "token_type": np.array([kind for kind, _ in vocabulary.values()], np.int32),
        "scores": np.array([score for _, score in vocabulary.values()], np.float32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | changes
    prefixed = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    return prefixed | {"tokenizer.chat_template": "{{ messages }}"}


def encoded(text: str, vocabulary: Mapping[str, tuple[TokenKind, float]]) -> list[str]:
    """The tokens of a text without special ones: join the best-scored pair, of equals the leftmost, while there is one.

    llama.cpp's `llm_tokenizer_spm` without its queue; "▁" goes in front, what is left without a token becomes bytes.
    """
    normal = {token: score for token, (kind, score) in vocabulary.items() if kind is TokenKind.NORMAL}
    symbols = [*("▁" + text).replace(" ", "▁")] if text else []
    while pairs := [
        (-normal[left + right], at) for at, (left, right) in enumerate(pairwise(symbols)) if left + right in normal
    ]:
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    spelled = [[symbol] if symbol in normal else [f"<0x{b:02X}>" for b in symbol.encode()] for symbol in symbols]
    return [token for part in spelled for token in part]
