from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer

from export.errors import SourceError
from export.tokenizer import Speech, TokenKind, read_speech
from tests.export.tiny_gguf import MERGES, SPECIAL_TOKENS, TEMPLATE, TOKENS


def metadata(**changes: Any) -> dict[str, Any]:
    kinds = [TokenKind.CONTROL] * len(SPECIAL_TOKENS) + [TokenKind.NORMAL] * (len(TOKENS) - len(SPECIAL_TOKENS))
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_type": [int(kind) for kind in kinds],
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    prefixed: dict[str, Any] = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return prefixed | {"tokenizer.chat_template": changes.get("template", TEMPLATE)}


def tokenizer_of(speech: Speech) -> Tokenizer:
    return Tokenizer.from_str(speech.tokenizer_json.decode())


def test_text_becomes_merged_tokens_and_back() -> None:
    tokenizer = tokenizer_of(read_speech(metadata()))
    assert tokenizer.encode("hell hell").tokens == ["hell", "Ġhell"]
    for text in ("hell\n  春 😀\x00", "no such thing"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_stand_alone_before_words_are_looked_for() -> None:
    tokenizer = tokenizer_of(read_speech(metadata()))
    # Without the digits rule the second space would go with the digit.
    assert tokenizer.encode("  12").tokens == ["ĠĠ", "1", "2"]


def test_control_tokens_are_one_id_and_can_be_left_out_when_decoding() -> None:
    tokenizer = tokenizer_of(read_speech(metadata()))
    ids = tokenizer.encode("<|im_start|>hell<|im_end|>").ids
    assert (ids[0], len(ids), ids[-1]) == (1, 3, 2)
    assert tokenizer.decode(ids) == "hell"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hell<|im_end|>"


def test_user_defined_tokens_are_one_id_and_stay_in_the_text() -> None:
    kinds = metadata()["tokenizer.ggml.token_type"]
    kinds[TOKENS.index("hell")] = int(TokenKind.USER_DEFINED)
    tokenizer = tokenizer_of(read_speech(metadata(token_type=kinds)))
    assert tokenizer.encode("xhellx").tokens == ["x", "hell", "x"]
    assert tokenizer.decode(tokenizer.encode("xhellx").ids) == "xhellx"


def test_the_end_of_sequence_id_leads_and_known_end_texts_follow() -> None:
    assert read_speech(metadata()).stop_ids == (2, 0)
    assert read_speech(metadata(eot_token_id=1)).stop_ids == (2, 0, 1)
    assert read_speech(metadata(eos_token_id=0)).stop_ids == (0, 2)


def test_an_end_text_that_is_no_control_token_does_not_stop() -> None:
    kinds = metadata()["tokenizer.ggml.token_type"]
    kinds[0] = int(TokenKind.NORMAL)
    assert read_speech(metadata(token_type=kinds)).stop_ids == (2,)


def test_a_model_without_a_first_token_has_none() -> None:
    assert read_speech(metadata()).bos_id == 1
    assert read_speech(metadata(bos_token_id=None)).bos_id is None


def test_the_same_arrays_give_the_same_bytes() -> None:
    assert read_speech(metadata()) == read_speech(metadata())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "llama"}, "The tokenizer is of the kind 'llama'"),
        ({"pre": "qwen2"}, "splits text in the manner 'qwen2'"),
        ({"pre": None}, "splits text in the manner None"),
        ({"tokens": None}, "'tokenizer.ggml.tokens' is missing"),
        ({"tokens": [TOKENS[1], *TOKENS[1:]]}, "lists a token twice"),
        ({"token_type": [1]}, "a type for each"),
        ({"merges": ["h e", "q zz"]}, "merge 'q zz' does not join"),
        ({"merges": ["h"]}, "merge 'h' does not join"),
        ({"eos_token_id": None}, "names no end-of-sequence id"),
        ({"eos_token_id": 999_999}, "eos_token_id is 999999"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"template": ""}, "no chat template"),
        ({"template": None}, "no chat template"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SourceError, match=sentence):
        read_speech(metadata(**changes))
