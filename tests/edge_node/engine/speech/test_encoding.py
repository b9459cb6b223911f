"""Texts that come again are not encoded again, and that makes no difference to their ids."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from core.conversation import Item
from edge_node.engine.speech import ChatTemplateSpeech, HarmonySpeech, Speech
from edge_node.engine.speech.encoding import (
    MAX_REMEMBERED_CHARACTERS,
    MIN_REMEMBERED_CHARACTERS,
    EncodingError,
    TextEncoder,
)
from edge_node.engine.speech.prompt import PromptEncoder
from tests.edge_node.engine.speech.harmony_speeches import RELEASE, tiny
from tests.edge_node.engine.speech.tiny_tokenizer import TEMPLATE, tiny_manifest, tiny_speech, tokenizer_json


class CountingTokenizer:
    """A tokenizer that notes the texts of moderate length that it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encoded: list[str] = []
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
        self.encoded += [text for text in texts if len(text) >= MIN_REMEMBERED_CHARACTERS]
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


class PanicException(BaseException):
    """What a panic in Rust becomes: pyo3 gives it this name."""


class PanickingTokenizer:
    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
        raise PanicException("byte index 3 is not a char boundary of 'the text'")


def plain_tokenizer() -> Any:
    tokenizer = Tokenizer.from_str(tokenizer_json())
    tokenizer.encode_special_tokens = True
    return CountingTokenizer(tokenizer)


def counting_chat_speech() -> tuple[CountingTokenizer, Speech, Speech]:
    plain, known = plain_tokenizer(), tiny_speech()
    marked, parsed = Tokenizer.from_str(tokenizer_json()), json.loads(tokenizer_json())
    encoder = PromptEncoder(plain, marked, parsed, known._table)
    return plain, ChatTemplateSpeech(tiny_manifest(), encoder, known._table, False, TEMPLATE), known


def counting_harmony_speech() -> tuple[CountingTokenizer, Speech, Speech]:
    known = tiny().speech
    tokenizer: Any = CountingTokenizer(known._tokenizer)
    return tokenizer, HarmonySpeech(tiny_manifest(), tokenizer, known.table, known.special), known


@pytest.mark.parametrize("speeches", [counting_chat_speech, counting_harmony_speech])
def test_the_next_turn_encodes_what_was_said_since(speeches: Any) -> None:
    counting, speech, other = speeches()
    first, answer, second = (name * MIN_REMEMBERED_CHARACTERS for name in ("ab ", "bc ", "<|end|> "))
    items = [Item("message", "user", first), Item("message", "assistant", answer), Item("message", "user", second)]
    speech.lay_out(items[:1], RELEASE)
    before = list(counting.encoded)
    assert before.count(first) == 1
    laid = speech.lay_out(items, RELEASE)
    assert counting.encoded[len(before) :] == [answer, second]
    assert laid == speech.lay_out(items, RELEASE) == other.lay_out(items, RELEASE)
    assert len(counting.encoded) == len(before) + 2


@pytest.mark.parametrize("characters", [1, MIN_REMEMBERED_CHARACTERS - 1, MAX_REMEMBERED_CHARACTERS + 1])
def test_short_and_very_long_texts_are_not_remembered(characters: int) -> None:
    tokenizer = plain_tokenizer()
    encode = TextEncoder(tokenizer)
    text = "a" * characters
    assert encode(text) == encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
    assert encode._remembered.cache_info().currsize == 0


@pytest.mark.parametrize("characters", [MIN_REMEMBERED_CHARACTERS, MAX_REMEMBERED_CHARACTERS])
def test_who_changes_the_ids_of_a_text_changes_his_own(characters: int) -> None:
    tokenizer = plain_tokenizer()
    encode = TextEncoder(tokenizer)
    text = "abc " * (characters // 4)
    known = tokenizer.encode(text, add_special_tokens=False).ids
    encode(text).clear()
    assert encode(text) == known
    assert tokenizer.encoded == [text]


def test_a_panic_of_the_library_is_an_error_of_this_text_and_tells_none_of_it() -> None:
    tokenizer: Any = PanickingTokenizer()
    with pytest.raises(EncodingError) as caught:
        TextEncoder(tokenizer)("the text")
    assert "the text" not in str(caught.value)
    assert caught.value.__cause__ is None
