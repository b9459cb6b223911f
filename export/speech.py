"""What a checkpoint says about text, whatever files it lay in."""

from __future__ import annotations

from dataclasses import dataclass


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
