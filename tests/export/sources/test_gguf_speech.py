from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
import pytest
import regex  # type: ignore[import-untyped]
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from export.errors import SourceError
from export.sources.gguf import GgufCheckpoint
from export.sources.gguf_speech import read_speech
from export.sources.gguf_tokenizer import TokenKind
from export.sources.speech import Speech
from tests.export import tiny_sentencepiece
from tests.export.strings import strings
from tests.export.tiny_gguf import MERGES, SPECIAL_TOKENS, TEMPLATE, TOKENS

#: Without the characters that are so new that libraries differ about them.
SAMPLES = ["".join(character for character in text if category(character) != "Cn") for text in strings(3000)]
KINDS = [TokenKind.CONTROL] * len(SPECIAL_TOKENS) + [TokenKind.NORMAL] * (len(TOKENS) - len(SPECIAL_TOKENS))


def metadata(**changes: Any) -> dict[str, Any]:
    """What a file's header says, as it is read; a change to None takes a key away."""
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_type": np.array(KINDS, np.int32),
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    prefixed: dict[str, Any] = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return prefixed | {"tokenizer.chat_template": changes.get("template", TEMPLATE)}


def kinds(**changes: TokenKind) -> Any:
    """Token kinds with some changed, by token."""
    changed = [changes.get(token, kind) for token, kind in zip(TOKENS, KINDS, strict=True)]
    return np.array(changed, np.int32)


def read(values: dict[str, Any]) -> Speech:
    return read_speech({key: value for key, value in values.items() if value is not None}, "x.gguf")


def tokenizer_of(values: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(read(values).tokenizer_json.decode())


def test_text_becomes_merged_tokens_and_back() -> None:
    tokenizer = tokenizer_of(metadata())
    assert tokenizer.encode("hell hell").tokens == ["hell", "Ġhell"]
    for text in ("hell\n  春 😀\x00", "no such thing"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_control_tokens_are_one_id_and_can_be_left_out_when_decoding() -> None:
    tokenizer = tokenizer_of(metadata())
    ids = tokenizer.encode("<|im_start|>hell<|im_end|>").ids
    assert (ids[0], len(ids), ids[-1]) == (1, 3, 2)
    assert tokenizer.decode(ids) == "hell"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hell<|im_end|>"


def test_user_defined_tokens_are_one_id_and_stay_in_the_text() -> None:
    tokenizer = tokenizer_of(metadata(token_type=kinds(hell=TokenKind.USER_DEFINED)))
    assert tokenizer.encode("xhellx").tokens == ["x", "hell", "x"]
    assert tokenizer.decode(tokenizer.encode("xhellx").ids) == "xhellx"


#: llama.cpp's rules (llama-vocab.cpp): each pattern cuts what the one before it left.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {
    "smollm": [r"\p{N}", GPT_2],
    "gpt-2": [GPT_2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "llama-bpe": [LLAMA_3],
    "qwen2": [LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")],
}


def pieces(text: str, rules: list[str]) -> list[str]:
    """What is left of a text after each rule has cut out what it finds."""
    parts = [text]
    for rule in rules:
        parts = [piece for part in parts for piece in regex.split(f"({rule})", part) if piece]
    return parts


@pytest.mark.parametrize("rule", RULES)
def test_text_is_split_as_llama_cpp_splits_it(rule: str) -> None:
    tokenizer = tokenizer_of(metadata(pre=rule))
    for text in SAMPLES:
        found = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:stop] for _, (start, stop) in found] == pieces(text, RULES[rule]), text


def test_other_names_of_llama_3s_rule_are_the_same_rule() -> None:
    texts = [read(metadata(pre=name)).tokenizer_json for name in ("llama-bpe", "llama3", "llama-v3")]
    assert texts[0] == texts[1] == texts[2]


def test_a_word_that_is_a_token_needs_no_merges_where_the_rule_says_so() -> None:
    changes = {"tokens": [*TOKENS, "shell"], "token_type": np.append(kinds(), 1)}
    assert tokenizer_of(metadata(pre="llama-bpe", **changes)).encode("shell").tokens == ["shell"]
    assert tokenizer_of(metadata(pre="qwen2", **changes)).encode("shell").tokens == ["s", "hell"]


def test_qwen_2_composes_characters_and_the_others_leave_them() -> None:
    decomposed = "e\u0301"
    for rule, composes in {"qwen2": True, "llama-bpe": False, "smollm": False}.items():
        tokenizer = tokenizer_of(metadata(pre=rule))
        assert (tokenizer.decode(tokenizer.encode(decomposed).ids) == "é") == composes


def test_the_small_models_tokenizer_never_changes(smollm2_gguf: Path) -> None:
    # Its release's name is made of it.
    speech = GgufCheckpoint.open(smollm2_gguf).speech
    digest = sha256(speech.tokenizer_json).hexdigest()
    assert digest == "f29ac2e7d5d7035f8a175376f5d1fc7e1db3618f8bd0377aa7b45d32b8872d8c"
    assert (speech.stop_ids, speech.bos_id, speech.size) == ((2, 0), 1, 49152)


SENTENCEPIECE = tiny_sentencepiece.tokens()
#: Spaces in runs, repeated letters, words of the vocabulary, and letters that it does not have.
PIECES = st.sampled_from(
    [" ", "  ", "\n", "aa", "a", "==", "--", "the", " in", "柳", "春天", "é", "ï", "😀", "🙃", "Z"]
)


@given(st.lists(PIECES, max_size=40).map("".join))
@example(" " * (2 * tiny_sentencepiece.LONGEST_RUN + 5) + "a")
def test_sentencepieces_tokens_are_those_of_its_rule(text: str) -> None:
    tokenizer = tokenizer_of(tiny_sentencepiece.metadata())
    found = tokenizer.encode(text)
    assert found.tokens == tiny_sentencepiece.encoded(text, SENTENCEPIECE)
    assert tokenizer.decode(found.ids) == text


def test_many_strings_have_sentencepieces_tokens_and_come_back() -> None:
    tokenizer = tokenizer_of(tiny_sentencepiece.metadata())
    tokenizer.encode_special_tokens = True
    for text in (text[:40] for text in SAMPLES):
        found = tokenizer.encode(text)
        assert found.tokens == tiny_sentencepiece.encoded(text, SENTENCEPIECE), text
        assert tokenizer.decode(found.ids) == text


def test_every_stretch_between_special_tokens_begins_with_a_space() -> None:
    # As llama.cpp does, and as these models were trained: each turn of a conversation was encoded by itself.
    tokenizer = tokenizer_of(tiny_sentencepiece.metadata())
    assert tokenizer.encode("the</s>the").tokens == ["▁the", "</s>", "▁the"]
    assert tokenizer.encode("the<|turn|>the").tokens == ["▁the", "<|turn|>", "▁the"]


def test_a_file_may_say_that_texts_begin_with_no_space() -> None:
    tokenizer = tokenizer_of(tiny_sentencepiece.metadata(add_space_prefix=False))
    assert tokenizer.encode("the the").tokens == ["the", "▁the"]
    assert tokenizer.decode(tokenizer.encode(" the").ids) == " the"


def test_merging_text_never_makes_a_control_token() -> None:
    tokenizer = tokenizer_of(tiny_sentencepiece.metadata())
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("a</s>").tokens == ["▁a", "</", "s>"]


def test_the_end_of_sequence_id_leads_and_known_end_texts_follow() -> None:
    assert read(metadata()).stop_ids == (2, 0)
    assert read(metadata(eot_token_id=1)).stop_ids == (2, 0, 1)
    assert read(metadata(eos_token_id=0)).stop_ids == (0, 2)
    assert read(tiny_sentencepiece.metadata()).stop_ids == (2,)


@pytest.mark.parametrize(("kind", "stops"), [("NORMAL", (2,)), ("USER_DEFINED", (2, 0)), ("CONTROL", (2, 0))])
def test_an_end_text_stops_if_it_is_a_token_of_its_own(kind: str, stops: tuple[int, ...]) -> None:
    assert read(metadata(token_type=kinds(**{"<|endoftext|>": TokenKind[kind]}))).stop_ids == stops


def test_a_model_without_a_first_token_has_none() -> None:
    assert read(metadata()).bos_id == 1
    assert read(metadata(bos_token_id=None)).bos_id is None


def test_the_same_arrays_give_the_same_bytes() -> None:
    assert read(metadata()) == read(metadata())
    assert read(tiny_sentencepiece.metadata()) == read(tiny_sentencepiece.metadata())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "t5"}, "of the kind 't5'"),
        ({"model": None}, "of the kind None"),
        ({"pre": "tekken"}, "splits text in the manner 'tekken'; this exporter knows smollm, gpt-2"),
        ({"pre": None}, "splits text in the manner None"),
        ({"pre": 3}, "splits text in the manner 3"),
        ({"tokens": None}, "no 'tokenizer.ggml.tokens'"),
        ({"tokens": []}, "no 'tokenizer.ggml.tokens'"),
        ({"tokens": np.arange(3)}, "no 'tokenizer.ggml.tokens'"),
        ({"tokens": [TOKENS[1], *TOKENS[1:]]}, "lists a token twice"),
        ({"token_type": np.array([1])}, "the type of each"),
        ({"token_type": None}, "the type of each"),
        ({"token_type": np.full(len(TOKENS), float("nan"))}, "the type of each"),
        ({"model": np.array([1, 2])}, "tokenizer.ggml.model' of x.gguf holds a list of 2, where one value is meant"),
        ({"model": ["gpt2"]}, "tokenizer.ggml.model' of x.gguf holds a list of 1"),
        ({"pre": ["smollm", "gpt-2"]}, "tokenizer.ggml.pre' of x.gguf holds a list of 2"),
        ({"eos_token_id": np.array([2])}, "tokenizer.ggml.eos_token_id' of x.gguf holds a list of 1"),
        ({"template": [TEMPLATE]}, "tokenizer.chat_template' of x.gguf holds a list of 1"),
        ({"merges": ["h e", "q zz"]}, "merge 'q zz' that does not join"),
        ({"merges": ["h"]}, "merge 'h' that does not join"),
        ({"merges": None}, "no 'tokenizer.ggml.merges'"),
        ({"eos_token_id": None}, "names no end-of-sequence id"),
        ({"eos_token_id": 999_999}, "eos_token_id = 999999"),
        ({"eos_token_id": "2"}, "eos_token_id = '2'"),
        ({"eos_token_id": True}, "eos_token_id = True"),
        ({"template": "{% for"}, "chat template in x.gguf cannot be used"),
        ({"template": "x" * ((1 << 20) + 1)}, "chat template in x.gguf has 1048577 characters, more than"),
        ({"template": ""}, "no chat template"),
        ({"template": None}, "no chat template"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SourceError, match=sentence) as caught:
        read(metadata(**changes))
    assert "x.gguf" in str(caught.value)


def scores(**changes: float) -> Any:
    """SentencePiece's scores with some changed, by token."""
    return np.array([changes.get(token, score) for token, (_, score) in SENTENCEPIECE.items()], np.float32)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scores": None}, "a score for each"),
        ({"scores": np.zeros(3)}, "a score for each"),
        ({"scores": np.zeros(len(SENTENCEPIECE), np.bool_)}, "a score for each"),
        ({"add_space_prefix": np.array([1, 2])}, "tokenizer.ggml.add_space_prefix' of x.gguf holds a list of 2"),
        ({"add_space_prefix": "no"}, "add_space_prefix = 'no', neither true nor false"),
        ({"scores": scores(the=float("nan"))}, "score nan"),
        ({"scores": scores(the=-1e9)}, "one score: which is merged first"),
        ({"tokens": [*[*SENTENCEPIECE][:-1], "a" * 1000]}, "a token of 1000 characters"),
        ({"tokens": [token.replace("<0x41>", "<0x__>") for token in SENTENCEPIECE]}, "not a token for each byte"),
    ],
)
def test_a_sentencepiece_tokenizer_that_is_not_whole_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SourceError, match=sentence) as caught:
        read(tiny_sentencepiece.metadata(**changes))
    assert "x.gguf" in str(caught.value)
