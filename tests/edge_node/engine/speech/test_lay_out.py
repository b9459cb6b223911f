"""Where items end in a prompt: ids up to there stay when the conversation goes on."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.conversation import Item
from edge_node.engine.speech import ChatTemplateSpeech, Rendered, Setting, Speech, SpeechError
from tests.edge_node.engine.speech import chat_templates as real
from tests.edge_node.engine.speech import harmony_conversations as harmony
from tests.edge_node.engine.speech.harmony_speeches import tiny as tiny_harmony
from tests.edge_node.engine.speech.test_sentencepiece import LLAMA_2
from tests.edge_node.engine.speech.test_sentencepiece import speech as sentencepiece
from tests.edge_node.engine.speech.tiny_tokenizer import END, ids_of_bytes, tiny_manifest, tiny_speech

RELEASE = tiny_manifest().release
ANSWER_IDS = st.lists(st.integers(3, 260), max_size=4)
WORDS = st.text(alphabet="ab <|>é\n", max_size=6)


@cache
def byte_level(template: str) -> ChatTemplateSpeech:
    return tiny_speech(template)


SPEECHES = {name: byte_level(template) for name, template in real.TEMPLATES.items()} | {
    f"{name}, SentencePiece": sentencepiece(template) for name, template in real.TEMPLATES.items()
}


@st.composite
def turns(draw: st.DrawFn, most: int = 6) -> list[Item]:
    """Some alternating, as some templates demand, with a system message or none; answers partly in ids."""
    items = [Item("message", "system", draw(WORDS))] if draw(st.booleans()) else []
    for index in range(draw(st.integers(1, most))):
        role = ("user", "assistant")[index % 2]
        ids = draw(ANSWER_IDS) if role == "assistant" and draw(st.booleans()) else None
        if role == "assistant" and draw(st.booleans()):
            items.append(Item("reasoning", "assistant", draw(WORDS)))
        items.append(Item("message", role, draw(WORDS), ids, RELEASE if ids is not None else ""))
    return items


def laid(speech: Speech, *items: Item) -> Rendered:
    return speech.lay_out(list(items), RELEASE)


def check(rendered: Rendered, items: list[Item]) -> None:
    assert len(rendered.ends) == len(items)
    assert rendered.ends == sorted(rendered.ends)
    assert all(0 <= end <= len(rendered.ids) for end in rendered.ends)


@pytest.mark.parametrize("name", SPEECHES)
@given(data=st.data())
def test_what_has_been_said_begins_every_longer_conversation(name: str, data: st.DataObject) -> None:
    items = data.draw(turns())
    whole = SPEECHES[name].lay_out(items, RELEASE)
    check(whole, items)
    for count in range(1, len(items)):
        try:
            part = SPEECHES[name].lay_out(items[:count], RELEASE)
        except SpeechError:  # two messages of one role, or only a system message
            continue
        assert part.ids[: part.ends[-1]] == whole.ids[: part.ends[-1]], count


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), WORDS), max_size=6))
def test_in_any_order_of_roles_too(said: list[tuple[str, str]]) -> None:
    items = [Item("message", role, text) for role, text in said]
    for template in (real.CHATML, real.LLAMA_3, real.ZEPHYR, real.PHI_3):
        whole = laid(byte_level(template), *items)
        check(whole, items)
        for count in range(1, len(items)):
            part = laid(byte_level(template), *items[:count])
            assert part.ids[: part.ends[-1]] == whole.ids[: part.ends[-1]]
            assert part.ends == whole.ends[:count]


def user(text: str) -> Item:
    return Item("message", "user", text)


def said(text: str) -> Item:
    return Item("message", "assistant", text)


def ended(template: str, *items: Item) -> list[str]:
    """What stands between the ends, special tokens spelled out; last what stands behind them all."""
    speech = byte_level(template)
    rendered = laid(speech, *items)
    text = [speech.bytes_of(token) for token in rendered.ids]
    borders = [0, *rendered.ends, len(text)]
    return [b"".join(text[a:b]).decode() for a, b in pairwise(borders)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (real.CHATML, ["<|start|>user\nq<|end|>\n", "<|start|>assistant\na<|end|>\n", "<|start|>user\nr<|end|>\n"]),
        (real.ZEPHYR, ["<|user|>\nq<|end|>\n", "<|assistant|>\na<|end|>\n", "<|user|>\nr<|end|>\n"]),
        (real.PHI_3, ["<|user|>\nq<|end|>\n", "<|assistant|>\na<|end|>\n", "<|user|>\nr<|end|>\n"]),
        (real.MISTRAL_FIRST, ["[INST] q [/INST]", " a<|end|>", "[INST] r [/INST]"]),
    ],
)
def test_an_item_ends_with_the_words_that_close_it(template: str, expected: list[str]) -> None:
    pieces = ended(template, user("q"), said("a"), user("r"))
    pieces[0] = pieces[0].removeprefix("<|start|>system\nYou are a helpful assistant.<|end|>\n")
    assert pieces[:3] == expected
    assert "".join(pieces[3:]) in ("<|start|>assistant\n", "<|assistant|>\n", "")


def test_a_header_is_the_next_item_s_and_the_answer_s_beginning_nobody_s() -> None:
    system = Item("message", "system", "s")
    pieces = ended(real.LLAMA_3, system, user("q"))
    assert pieces[1:] == ["<|start|>user<|other|>\n\nq<|end|>", "<|start|>assistant<|other|>\n\n"]


def test_a_system_message_that_is_folded_into_the_last_question_ends_nothing_that_will_stay() -> None:
    system = Item("message", "system", "s")
    folded = laid(byte_level(real.MISTRAL_LAST), system, user("q"))
    longer = laid(byte_level(real.MISTRAL_LAST), system, user("q"), said("a"), user("r"))
    assert folded.ids[: folded.ends[-1]] == longer.ids[: folded.ends[-1]]
    assert folded.ends[0] == folded.ends[1] == len(ids_of_bytes(b"[INST] ")) < len(folded.ids)
    assert ended(real.MISTRAL_LAST, user("q"), said("a"))[:2] == ["[INST] q [/INST]", " a<|end|>"]


def test_what_is_written_about_an_answer_only_while_it_is_the_last_is_not_said() -> None:
    assert ended(real.QWEN_3, user("q"), said("a"))[1] == "<|start|>assistant\n"
    assert ended(real.QWEN_3, user("q"), said("a"), user("r"))[1] == "<|start|>assistant\na<|end|>\n"


def test_reasoning_ends_where_the_item_before_it_does() -> None:
    thought = Item("reasoning", "assistant", "hm")
    rendered = laid(byte_level(real.CHATML), thought, user("q"), thought, said("a"), thought)
    plain = laid(byte_level(real.CHATML), user("q"), said("a"))
    assert rendered.ids == plain.ids
    assert rendered.ends == [0, plain.ends[0], plain.ends[0], plain.ends[1], plain.ends[1]]


def test_an_answer_in_its_own_ids_ends_behind_its_stop_id() -> None:
    answer = Item("message", "assistant", "abc", ids_of_bytes(b"abc"), RELEASE)
    rendered = laid(byte_level(real.LLAMA_3), user("q"), answer)
    assert rendered.ids[rendered.ends[1] - 4 : rendered.ends[1]] == [*ids_of_bytes(b"abc"), END]


def test_a_space_that_may_become_part_of_the_next_word_is_not_said() -> None:
    speech = sentencepiece(LLAMA_2)
    question = laid(speech, user("the"))
    for token in range(3, 40):
        answer = Item("message", "assistant", "x", [token], "tiny@000000000000")
        longer = speech.lay_out([user("the"), answer], "tiny@000000000000")
        assert longer.ids[: question.ends[0]] == question.ids[: question.ends[0]]


@given(st.integers(0, 10_000))
def test_harmony_keeps_what_has_been_said_as_long_as_nothing_is_dropped(seed: int) -> None:
    random = Random(seed)
    items = [item for item in harmony.conversation(random) if item.kind != "reasoning"]
    setting = Setting(harmony.setting(random).tools)
    speech = tiny_harmony().speech
    whole = speech.lay_out(items, RELEASE, setting)
    check(whole, items)
    opening = next((at for at, item in enumerate(items) if item.role not in ("system", "developer")), len(items))
    for count in range(opening + 1, len(items)):
        before_a_call = items[count].kind == "function_call" and items[count - 1].phase == ""
        if not before_a_call:  # only then is it known that what was said was a preamble
            part = speech.lay_out(items[:count], RELEASE, setting)
            assert part.ids[: part.ends[-1]] == whole.ids[: whole.ends[count - 1]]
