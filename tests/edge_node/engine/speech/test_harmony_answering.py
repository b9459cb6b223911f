"""Where in a gpt-oss answer a format can be enforced, against a definition that knows no states."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_node.engine.speech.harmony_format import item_of, read_header
from tests.edge_node.engine.speech.harmony_speeches import tiny
from tests.edge_node.engine.speech.tiny_tokenizer import END, OTHER, ids_of_bytes, tiny_speech

ANSWER = "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.look <|constrain|>json<|message|>"
THOUGHT = "<|channel|>analysis<|message|>"
PREAMBLE = "<|channel|>commentary<|message|>"
STOPS = ("<|return|>", "<|call|>")
TERMINATORS = ("<|end|>", *STOPS)
PIECES = [ANSWER, CALL, THOUGHT, PREAMBLE, *TERMINATORS, "<|end|>", "<|start|>", "<|start|>assistant", "<|message|>"]
PIECES += ["<|channel|>", "<|channel|>final", "<|constrain|>", "to=functions.f", " code", "assistant", "so", '{"a":1}']


def enforceable(ids: list[int]) -> bool:
    """Whether the id after these would be content, from its first id on, of a message that answers."""
    special = tiny().speech.special
    if any(special[stop] in ids for stop in STOPS):
        return False
    message, start, end = special["<|message|>"], special["<|start|>"], special["<|end|>"]
    ended = max((at + 1 for at, token in enumerate(ids) if token == end), default=0)
    said = ids[ended:]
    if message not in said:
        return False
    head = said[: said.index(message)]
    if start in head:
        role, head = "", head[len(head) - head[::-1].index(start) :]
    elif not ended or head[:1] == [special["<|channel|>"]]:
        role = "assistant"
    else:
        return False
    header = read_header(tiny().text(head), role)
    if header is None:
        return False
    item = item_of(header)
    return item.kind == "message" and item.phase != "commentary"


@settings(max_examples=500)
@given(st.lists(st.sampled_from(PIECES), max_size=10), st.data())
@example([THOUGHT, "so", "<|end|>", "<|start|>assistant", ANSWER, '{"a":1}', "<|return|>"], None)
def test_it_answers_where_the_definition_says(pieces: list[str], data: st.DataObject | None) -> None:
    ids = tiny().ids("".join(pieces))
    if data is not None and ids:  # one id lost or thrown in, anywhere
        at = data.draw(st.integers(0, len(ids) - 1))
        ids[at : at + data.draw(st.integers(0, 1))] = data.draw(st.lists(st.sampled_from(ids), max_size=1))
    parser = tiny().speech.start()
    for count, token in enumerate(ids):
        assert parser.answering == enforceable(ids[:count]), tiny().text(ids[:count])
        parser.push(token)
    assert parser.answering == enforceable(ids)


@pytest.mark.parametrize(
    ("said", "answering"),
    [
        ("", False),
        ("<|channel|>final", False),
        (ANSWER, True),
        (f"{ANSWER}so", True),
        ("<|message|>", True),
        (f"{ANSWER}so<|end|>", False),
        (f"{ANSWER}so<|return|>", False),
        (THOUGHT, False),
        (PREAMBLE, False),
        (CALL, False),
        (f"{THOUGHT}so<|end|><|start|>assistant{ANSWER}", True),
        ("Hello, I know no format", False),
        ("<|channel|>thinking<|message|>", False),
    ],
)
def test_only_the_content_of_an_answer_is_one(said: str, answering: bool) -> None:
    parser = tiny().speech.start()
    for token in tiny().ids(said):
        parser.push(token)
    assert parser.answering is answering


def test_it_answers_no_more_after_a_stop_string() -> None:
    parser = tiny().speech.start(["so"])
    for token in tiny().ids(f"{ANSWER}so"):
        parser.push(token)
    assert parser.stopped and not parser.answering


def test_a_call_s_end_closes_no_answer_and_a_message_s_end_no_response() -> None:
    special = tiny().speech.special
    assert special["<|return|>"] in tiny().speech.closing_ids
    assert tiny().speech.closing_ids.isdisjoint({special["<|call|>"], special["<|end|>"]})


def test_a_chat_template_s_answer_is_all_answer_until_it_stops() -> None:
    parser = tiny_speech().start()
    heard = [parser.answering]
    for token in [OTHER, *ids_of_bytes(b"a"), END]:
        parser.push(token)
        heard.append(parser.answering)
    assert heard == [True, True, True, False]
    assert tiny_speech().closing_ids == {END}


def test_bytes_of_ids_spell_special_tokens_out() -> None:
    chat, harmony = tiny_speech(), tiny().speech
    assert (chat.bytes_of(END), chat.bytes_of(ids_of_bytes(b"a")[0])) == (b"<|end|>", b"a")
    assert harmony.bytes_of(harmony.special["<|end|>"]) == b"<|end|>"
    assert [speech.bytes_of(token) for speech in (chat, harmony) for token in (-1, 10**9)] == [b""] * 4
