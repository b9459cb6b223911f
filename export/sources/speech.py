"""What a checkpoint says about text, whatever files it lay in."""

from __future__ import annotations

from dataclasses import dataclass

# fmt: off
#: Special tokens that end a turn or a document, whether or not a checkpoint's files say so; as llama.cpp knows them.
END_TEXTS = frozenset({
    "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "</s>",
})
# fmt: on


@dataclass(frozen=True)
class Speech:
    """What a release says about text.

    chat_template None: the family has its own renderer (harmony). stop_ids: the end-of-sequence id first, then the
    others, ascending. bos_id is what a template calls bos_token; nothing prepends it. size: ids the tokenizer knows.
    """

    tokenizer_json: bytes
    chat_template: str | None
    stop_ids: tuple[int, ...]
    bos_id: int | None
    size: int
