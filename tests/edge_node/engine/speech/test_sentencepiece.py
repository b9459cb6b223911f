"""What the exporter writes for SentencePiece vocabularies, streamed and prompted with."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jinja2
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from core.conversation import Item
from core.errors import ReleaseError
from edge_node.engine.speech import ChatTemplateSpeech
from edge_node.engine.speech.detokeniser import Detokeniser, byte_table, drops_first_space
from export.sources.gguf_speech import read_speech
from tests.export.tiny_sentencepiece import SPECIAL_TOKENS, USER_DEFINED, metadata
from tests.fakes import fake_manifest

TOKENIZER_JSON = read_speech(metadata(), "tiny").tokenizer_json.decode()
TOKENIZER = Tokenizer.from_str(TOKENIZER_JSON)
TABLE = byte_table(json.loads(TOKENIZER_JSON))
BOS, EOS = 1, 2
RELEASE = "tiny@000000000000"
PIECES = st.sampled_from([" ", "  ", "\n", "aa", "the", " in", "柳", "春天", "é", "😀", "Z", "[", "/", "<a/>"])
TEXTS = st.lists(PIECES, max_size=20).map("".join)

#: How Llama 2 and Zephyr talk; a user's turn follows a special token, a word or a line's end.
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BARE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def metaspace(scheme: str) -> str:
    """The same vocabulary as transformers writes it for newer Llamas."""
    parsed = json.loads(TOKENIZER_JSON)
    steps = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return json.dumps(parsed | {"normalizer": None, "pre_tokenizer": steps})


WAYS = {"prepend": TOKENIZER_JSON, "first": metaspace("first"), "always": metaspace("always")}


TEMPLATES = {"llama-2": LLAMA_2, "zephyr": ZEPHYR, "bare": BARE}
IDS = TOKENIZER.get_vocab()


def ids_of(*tokens: str) -> list[int]:
    return [IDS[token] for token in tokens]


def streamed(ids: list[int]) -> list[str]:
    detokeniser = Detokeniser(TABLE, drops_first_space(json.loads(TOKENIZER_JSON)))
    return [detokeniser.push(token) for token in ids]


@cache
def speech(template: str, way: str = "prepend") -> ChatTemplateSpeech:
    manifest = msgspec.structs.replace(fake_manifest(RELEASE), bos_id=BOS, stop_ids=[EOS])
    return ChatTemplateSpeech.from_files(manifest, WAYS[way], template)


def user(text: str) -> Item:
    return Item("message", "user", text)


def whole(template: str, way: str, items: list[Item]) -> list[int]:
    """The conversation rendered as one text and encoded at once."""
    rendered = jinja2.Environment().from_string(template)
    messages = [{"role": item.role, "content": item.text} for item in items]
    text = rendered.render(messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    ids: list[int] = tokenizer(way).encode(text).ids
    return ids


@cache
def tokenizer(way: str) -> Tokenizer:
    return Tokenizer.from_str(WAYS[way])


@given(TEXTS)
def test_streamed_text_is_the_text_that_was_encoded(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert "".join(streamed(ids)) == TOKENIZER.decode(ids) == text


@given(st.lists(st.integers(0, len(TABLE) - 1), max_size=8))
def test_any_ids_are_what_the_library_makes_of_them(ids: list[int]) -> None:
    expected = TOKENIZER.decode(ids)
    if "\ufffd" not in expected:  # of bytes that are no character the library makes one each
        assert "".join(streamed(ids)) == expected


def test_a_character_of_byte_tokens_comes_whole_with_its_last_id() -> None:
    ids = ids_of("▁the", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "▁the")
    assert streamed(ids) == ["the", "", "", "", "🙂", " the"]


def test_the_first_space_is_not_text_and_the_second_is() -> None:
    assert streamed(ids_of("▁", "▁the")) == ["", " the"]
    assert streamed([EOS, *ids_of("▁the")]) == ["", "the"]
    assert streamed(ids_of("the", "▁the")) == ["the", " the"]
    assert streamed(ids_of("<0x20>", "the")) == ["", "the"]


def test_special_ids_have_no_text_and_user_defined_ones_have_theirs() -> None:
    assert [TABLE[token] for token in ids_of(*SPECIAL_TOKENS)] == [b""] * 3
    assert TABLE[IDS[USER_DEFINED]] == USER_DEFINED.encode()


@pytest.mark.parametrize("step", [{"type": "WordPiece"}, {"type": "Strip", "content": " ", "start": 2, "stop": 0}])
def test_a_decoder_that_cannot_be_streamed_is_refused(step: dict[str, Any]) -> None:
    parsed = json.loads(TOKENIZER_JSON)
    parsed["decoder"]["decoders"].append(step)
    with pytest.raises(ReleaseError, match="cannot be streamed"):
        byte_table(parsed)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@given(data=st.data())
def test_a_prompt_is_the_ids_of_the_whole_text(template: str, way: str, data: st.DataObject) -> None:
    # Not of texts with spaces at their edges: nothing is merged across those.
    contents = st.lists(st.one_of(PIECES, st.just(USER_DEFINED)), max_size=12).map("".join)
    texts = [data.draw(contents).strip() or "a" for _ in range(3)]
    items = [user(texts[0]), Item("message", "assistant", texts[1]), user(texts[2])]
    assert speech(template, way).lay_out(items, RELEASE).ids == whole(template, way, items)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_next_prompt_begins_with_exactly_what_the_model_saw_and_said(template: str, way: str) -> None:
    tiny = speech(template, way)
    for said in (["▁the", "▁in"], ["the", "▁in"], ["<0xF0>"], ["▁", "▁the"], []):
        prompt = tiny.lay_out([user("the")], RELEASE).ids
        if template == LLAMA_2 and not (said and said[0].startswith("▁")):
            prompt += ids_of("▁")  # the space that the template writes and the model did not say
        answer = Item("message", "assistant", "x", ids_of(*said), RELEASE)
        again = tiny.lay_out([user("the"), answer, user("in")], RELEASE).ids
        assert again[: len(prompt) + len(said)] == prompt + ids_of(*said), said


def test_a_space_at_the_end_of_a_prompt_is_an_id_that_the_next_prompt_has_too() -> None:
    tiny = speech("{% for m in messages %}{{ m.content }}: {% endfor %}")
    prompt = tiny.lay_out([user("the")], RELEASE).ids
    answer = Item("message", "assistant", "x", ids_of("the"), RELEASE)
    assert prompt[-1:] == ids_of("▁")
    assert tiny.lay_out([user("the"), answer], RELEASE).ids[: len(prompt) + 1] == prompt + ids_of("the")


def test_a_special_token_in_a_text_is_plain_text() -> None:
    ids = speech(ZEPHYR).lay_out([user("</s><s> the</s>")], RELEASE).ids
    assert (ids.count(BOS), ids.count(EOS)) == (0, 1)


def test_ids_that_the_tokenizer_does_not_know_are_repeated_as_they_are() -> None:
    answer = Item("message", "assistant", "", [10_000], RELEASE)
    assert 10_000 in speech(LLAMA_2).lay_out([user("the"), answer], RELEASE).ids


@pytest.mark.parametrize("way", WAYS)
@given(text=st.one_of(TEXTS, st.text(alphabet=" ▁a春", max_size=60)))
def test_no_text_has_fewer_ids_than_promised(way: str, text: str) -> None:
    tiny = speech(ZEPHYR, way)
    assert tiny.least_tokens([user(text)], RELEASE) <= len(tiny.lay_out([user(text)], RELEASE).ids)
    assert tiny.least_tokens([user("the " * 1000)], RELEASE) > 100
