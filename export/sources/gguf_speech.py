"""What a GGUF says about text: tokenizer, chat template, and the ids that end an answer.

Does not know files.
"""

from __future__ import annotations

import numpy as np

from export.errors import SourceError
from export.sources.gguf_header import Metadata, shown_value, single
from export.sources.gguf_tokenizer import PREFIX, TokenKind, Vocabulary, strings, tokenizer_json
from export.sources.hf_speech import check_template
from export.sources.speech import END_TEXTS, Speech


def read_speech(metadata: Metadata, where: str) -> Speech:
    """Everything about text; raises SourceError, naming `where`, if something is missing or of an unknown kind."""
    tokens = strings(metadata, PREFIX + "tokens", where)
    vocabulary = Vocabulary(tokens, _kinds(metadata, len(tokens), where), where)
    template = single(metadata, "tokenizer.chat_template", where)
    if not isinstance(template, str) or not template:
        raise SourceError(f"{where} has no chat template; export an instruct model.")
    check_template(template, where)
    return Speech(
        tokenizer_json=tokenizer_json(metadata, vocabulary),
        chat_template=template,
        stop_ids=_stop_ids(metadata, vocabulary),
        bos_id=_optional_id(metadata, "bos_token_id", vocabulary),
        size=len(tokens),
    )


def _stop_ids(metadata: Metadata, vocabulary: Vocabulary) -> tuple[int, ...]:
    named = [_optional_id(metadata, key, vocabulary) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    if named[0] is None:
        raise vocabulary.damaged(f"names no end-of-sequence id ({PREFIX}eos_token_id)")
    ends = {index for index in named if index is not None}
    whole = (TokenKind.CONTROL, TokenKind.USER_DEFINED)
    ends |= {i for i, token in enumerate(vocabulary.tokens) if token in END_TEXTS and vocabulary.kinds[i] in whole}
    return (named[0], *sorted(ends - {named[0]}))


def _optional_id(metadata: Metadata, key: str, vocabulary: Vocabulary) -> int | None:
    value = single(metadata, PREFIX + key, vocabulary.where)
    if value is None:
        return None
    size = len(vocabulary.tokens)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
        raise vocabulary.damaged(f"has {key} = {shown_value(value)} and {size} tokens")
    return value


def _kinds(metadata: Metadata, size: int, where: str) -> list[int]:
    kinds = metadata.get(PREFIX + "token_type")
    if not isinstance(kinds, np.ndarray) or kinds.dtype.kind not in "iu" or len(kinds) != size:
        raise SourceError(
            f"The tokenizer of {where} does not give a whole number as the type of each of its {size} tokens; "
            "take another file of this model."
        )
    return [int(kind) for kind in kinds]
