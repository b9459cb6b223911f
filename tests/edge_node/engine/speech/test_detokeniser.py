from __future__ import annotations

import codecs
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ReleaseError
from edge_node.engine.speech.detokeniser import Detokeniser, byte_table
from tests.edge_node.engine.speech.tiny_tokenizer import END, OTHER, ids_of_bytes, tokenizer_json

TABLE = byte_table(json.loads(tokenizer_json()))
MIXED = "a 三条河 🏞️👩‍👩‍👧 é ﷽ \r\n\u2028 𝄞"


def decoded(data: bytes) -> str:
    """The whole at once, an unfinished character at the end left out."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def test_the_table_spells_every_byte_once_and_special_ids_not_at_all() -> None:
    assert sorted(TABLE[3:259]) == [bytes([byte]) for byte in range(256)]
    assert TABLE[END] == TABLE[OTHER] == b""
    assert TABLE[259:] == [b"ab", b"abc", b"\xf0\x9f"]


@given(st.lists(st.one_of(st.text(alphabet=MIXED).map(str.encode), st.binary(max_size=4))).map(b"".join))
def test_pieces_joined_are_the_whole_decoded_whatever_the_bytes(data: bytes) -> None:
    detokeniser = Detokeniser(TABLE)
    assert "".join(detokeniser.push(token) for token in ids_of_bytes(data)) == decoded(data)


def test_a_character_comes_whole_with_its_last_id() -> None:
    detokeniser = Detokeniser(TABLE)
    assert [detokeniser.push(token) for token in [261, *ids_of_bytes(b"\x99\x82!")]] == ["", "", "🙂", "!"]


def test_what_is_no_character_is_replaced_once_that_is_certain() -> None:
    detokeniser = Detokeniser(TABLE)
    assert [detokeniser.push(token) for token in ids_of_bytes(b"\xe4\xb8x\xff")] == ["", "", "\ufffdx", "\ufffd"]


def test_ids_beyond_the_tokenizer_say_nothing() -> None:
    assert Detokeniser(TABLE).push(10_000) == ""


def test_added_tokens_that_are_not_special_are_text() -> None:
    tokenizer = json.loads(tokenizer_json())
    tokenizer["added_tokens"][OTHER]["special"] = False
    assert byte_table(tokenizer)[OTHER] == b"<|other|>"


def test_a_vocabulary_that_is_not_byte_level_is_refused_by_name() -> None:
    tokenizer = {"model": {"vocab": {"▁the": 0}}}
    with pytest.raises(ReleaseError, match="'▁', which is not byte-level"):
        byte_table(tokenizer)
