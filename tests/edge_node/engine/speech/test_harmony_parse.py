"""What gpt-oss says, with the tiny vocabulary: a token is a byte or two, so everything comes in pieces."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.frames import Arguments, ItemEnd, ItemStart, Text
from edge_node.engine.speech.harmony import HarmonySpeech
from edge_node.engine.speech.harmony_format import Header, Marks, may_become_header, read_header
from edge_node.engine.speech.harmony_parse import HarmonyParser
from tests.edge_node.engine.speech.harmony_speeches import check_one_text_an_id, joined, tiny
from tests.fakes import fake_manifest

ANSWER = "<|channel|>final<|message|>"
CALL = '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"q":1}<|call|>'


def hear(text: str, *stop: str) -> list[tuple[str, str, str, str]]:
    deltas = tiny().hear(tiny().ids(text), stop)
    check_one_text_an_id(deltas)
    return joined(deltas)


def parser_after(text: str, *stop: str) -> HarmonyParser:
    parser = tiny().speech.start(stop)
    for token in tiny().ids(text):
        parser.push(token)
    return parser


# -- what the format says -------------------------------------------------------------------


def test_reasoning_then_an_answer() -> None:
    said = hear(f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{ANSWER}Hi 👋<|return|>")
    assert said == [("reasoning", "", "", "Hm."), ("message", "final_answer", "", "Hi 👋")]


def test_a_preamble_and_a_call() -> None:
    said = hear(f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{CALL}")
    assert said == [("message", "commentary", "", "I look."), ("function_call", "", "look", '{"q":1}')]


def test_an_item_starts_with_the_message_token_and_ends_with_a_terminator() -> None:
    deltas = tiny().hear(tiny().ids("<|channel|>final<|message|>ok<|return|>"))
    assert deltas[-4:] == [[ItemStart("message", "final_answer")], [Text("o")], [Text("k")], [ItemEnd()]]
    assert not any(deltas[:-4])


def test_arguments_are_streamed_as_arguments() -> None:
    deltas = tiny().hear(tiny().ids(CALL))
    assert deltas[-3:] == [[Arguments("1")], [Arguments("}")], [ItemEnd()]]


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.look <|constrain|>json",
        " to=functions.look<|channel|>commentary <|constrain|>json",
        " to=functions.look<|channel|>commentary<|constrain|>json",
        "<|channel|>commentary to=functions.look<|constrain|>json",
        "<|channel|>commentary to=functions.look <|constrain|> json",
        "<|channel|>commentary <|constrain|>json to=functions.look",
        "<|channel|>commentary to=functions.look json",
        "<|channel|>commentary to=functions.look code",
        "<|channel|>commentary to=functions.look",
        "<|channel|>commentary functions.look",
        "<|channel|>analysis to=functions.look",
        "<|channel|> commentary  to=functions.look\n",
        " to=functions.look",
        "assistant<|channel|>commentary to=functions.look",
    ],
)
def test_a_call_may_name_its_function_in_any_order(header: str) -> None:
    assert hear(header + "<|message|>{}<|call|>") == [("function_call", "", "look", "{}")]
    again = f"<|channel|>analysis<|message|>x<|end|><|start|>assistant{header.removeprefix('assistant')}<|message|>"
    assert hear(again + "{}")[1:] == [("function_call", "", "look", "{}")]


@pytest.mark.parametrize("recipient", ["browser.search", "python", "functions.", "assistant"])
def test_a_call_of_what_is_no_function_is_commentary(recipient: str) -> None:
    for channel in ("analysis", "commentary"):
        said = hear(f"<|channel|>{channel} to={recipient} code<|message|>1+1<|call|>")
        assert said == [("message", "commentary", "", "1+1")]


def test_a_message_to_everybody_is_what_its_channel_says() -> None:
    assert hear("<|channel|>final to=all<|message|>Hi") == [("message", "final_answer", "", "Hi")]


def test_a_content_type_without_a_recipient_is_no_recipient() -> None:
    for form in (" <|constrain|>json", "<|constrain|>json", " json"):
        assert hear(f"<|channel|>final{form}<|message|>{{}}") == [("message", "final_answer", "", "{}")]


def test_a_message_without_a_channel_is_a_message() -> None:
    assert hear("<|message|>Hi<|return|>") == [("message", "", "", "Hi")]


def test_return_and_call_end_the_response_and_end_does_not() -> None:
    assert not parser_after(f"{ANSWER}Hi<|end|>").stopped
    assert parser_after(f"{ANSWER}Hi<|return|>").stopped
    assert parser_after(CALL).stopped
    assert parser_after("<|return|>").stopped


def test_a_stop_id_of_the_release_ends_the_response() -> None:
    speech = tiny().speech
    stop_ids = frozenset({tiny().id("<|endoftext|>")})
    parser = HarmonyParser(Marks.of(speech.special), speech.table, stop_ids)
    said = [parser.push(token) for token in tiny().ids(f"{ANSWER}Hi<|endoftext|>")]
    assert joined(said) == [("message", "final_answer", "", "Hi")]
    assert said[-1] == [ItemEnd()] and parser.stopped


def test_end_is_no_stop_id_even_where_the_release_lists_it() -> None:
    speech = tiny().speech
    manifest = msgspec.structs.replace(fake_manifest(), stop_ids=[tiny().id("<|end|>")])
    listed = HarmonySpeech(manifest, speech._tokenizer, speech.table, speech.special).start()
    for token in tiny().ids(f"{ANSWER}Hi<|end|>"):
        listed.push(token)
    assert not listed.stopped


def test_reasoning_tokens_are_the_content_of_reasoning() -> None:
    parser = parser_after(f"<|channel|>analysis<|message|>123<|end|><|start|>assistant{ANSWER}45<|return|>")
    assert parser.reasoning_tokens == 3


# -- what the format does not say: text, nothing lost ---------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Hello, I know no format.",
        "Hi",
        "<|channel|>thinking<|message|>so",
        "<|channel|>final final<|channel|>final<|message|>so",
        "<|channel|>analysis<|channel|>final<|message|>so",
        "<|channel|><|message|>so",
        "<|constrain|><|message|>so",
        "<|channel|>final to=a to=b<|message|>so",
        "Sure! <|channel|>final<|message|>so",
        "to=" + "x" * 600 + "<|channel|>final<|message|>so",
        "<|endoftext|><|message|>so",
    ],
)
def test_a_header_that_is_none_is_text(text: str) -> None:
    assert hear(text + "<|return|>") == [("message", "", "", text)]


def test_plain_text_is_not_held_back() -> None:
    assert tiny().hear(tiny().ids("Hello"))[0] == [ItemStart("message"), Text("H")]


def test_a_header_without_end_is_not_held_back() -> None:
    assert hear("to=" + "x" * 600) == [("message", "", "", "to=" + "x" * 600)]


@pytest.mark.parametrize("role", ["user", "system", "functions.look to=assistant", "assistant2", "Assistant"])
def test_what_the_model_says_in_another_role_is_text(role: str) -> None:
    header = f"<|start|>{role}<|channel|>final<|message|>"
    said = hear(f"{ANSWER}Hi<|end|>{header}so<|return|>")
    assert said == [("message", "final_answer", "", "Hi"), ("message", "", "", header + "so")]


def test_after_a_failed_header_the_next_start_is_heard() -> None:
    said = hear(f"What? <|start|>assistant{ANSWER}Hi<|return|>")
    assert said == [("message", "", "", "What? "), ("message", "final_answer", "", "Hi")]
    assert hear(f"to=x<|start|>assistant{ANSWER}Hi") == [("message", "", "", "to=x"), said[1]]


def test_the_role_after_start_may_be_forgotten_with_it_but_not_alone() -> None:
    assert hear(f"{ANSWER}a<|end|>{ANSWER}b")[1] == ("message", "final_answer", "", "b")
    assert hear(f"{ANSWER}a<|end|><|start|>{ANSWER}b")[1] == ("message", "", "", f"<|start|>{ANSWER}b")


def test_a_repeated_start_is_a_new_header() -> None:
    assert hear(f"<|start|>assistant{ANSWER}Hi<|return|>") == [("message", "final_answer", "", "Hi")]


def test_special_tokens_in_a_message_are_text() -> None:
    content = "a<|start|>assistant<|channel|>final<|message|>b<|constrain|><|endoftext|>"
    assert hear(f"{ANSWER}{content}<|return|>") == [("message", "final_answer", "", content)]


def test_a_header_that_a_terminator_cuts_off_is_text() -> None:
    assert hear("<|channel|>analysis<|end|>") == [("message", "", "", "<|channel|>analysis")]
    assert hear("assis<|return|>") == [("message", "", "", "assis")]


def test_terminators_that_end_nothing_say_nothing() -> None:
    assert hear(f"{ANSWER}Hi<|end|><|end|><|return|>") == [("message", "final_answer", "", "Hi")]
    assert hear("<|end|><|call|>") == []


def test_text_after_a_message_is_a_message() -> None:
    said = hear(f"{ANSWER}Hi<|end|>and <|message|>so<|start|>on<|return|>")
    assert said[1:] == [("message", "", "", "and <|message|>so<|start|>on")]
    said = hear(f"{ANSWER}Hi<|end|><|message|>so<|start|>on<|return|>")
    assert said[1:] == [("message", "", "", "<|message|>so<|start|>on")]


def test_ids_that_nobody_knows_have_no_text() -> None:
    parser = tiny().speech.start()
    assert [parser.push(token) for token in (10**9, -1)] == [[], []]


# -- characters, stop strings, the limit ----------------------------------------------------


def bytes_of(data: bytes) -> list[int]:
    """The tiny vocabulary's first ids are the bytes, in GPT-2's order."""
    table = tiny().speech.table
    return [table.index(bytes([byte])) for byte in data]


def test_a_character_is_never_cut() -> None:
    deltas = tiny().hear([*tiny().ids(ANSWER), *bytes_of("a👍".encode())])
    assert deltas[-5:] == [[Text("a")], [], [], [], [Text("👍")]]


def test_a_character_that_a_terminator_cuts_off_is_shown_as_one() -> None:
    deltas = tiny().hear([*tiny().ids(ANSWER), *bytes_of("👍".encode()[:3]), tiny().id("<|end|>")])
    assert deltas[-1] == [Text("\ufffd"), ItemEnd()]


def test_a_character_that_the_limit_cuts_off_is_not_shown() -> None:
    parser = parser_after(ANSWER)
    first, second = bytes_of("é".encode()[:1] * 2)
    assert parser.push(first) == []
    assert parser.push(second, last=True) == [Text("\ufffd")]


def test_a_character_that_begins_in_a_failed_header_is_whole() -> None:
    first, second = bytes_of("é".encode())
    deltas = tiny().hear([first, second])
    assert joined(deltas) == [("message", "", "", "é")]


def test_a_stop_string_is_not_shown_and_ends_the_response() -> None:
    assert hear(f"{ANSWER}one STOP two", "STOP") == [("message", "final_answer", "", "one ")]
    assert parser_after(f"{ANSWER}one STOP two", "STOP").stopped
    assert hear("Plain STOP text", "STOP") == [("message", "", "", "Plain ")]


def test_stop_strings_are_for_answers_only() -> None:
    before = "<|channel|>analysis<|message|>STOP<|end|><|start|>assistant<|channel|>commentary<|message|>STOP<|end|>"
    call = '<|start|>assistant<|channel|>commentary to=functions.f<|message|>"STOP"<|call|>'
    assert [text for *_, text in hear(before + call, "STOP")] == ["STOP", "STOP", '"STOP"']


def test_a_stop_string_over_two_messages_is_none() -> None:
    said = hear(f"{ANSWER}ab<|end|><|start|>assistant{ANSWER}cd<|return|>", "bc")
    assert [text for *_, text in said] == ["ab", "cd"]


def test_nothing_is_held_back_at_the_limit() -> None:
    parser = parser_after(f"{ANSWER}ST", "STOP")
    assert parser.push(tiny().id("O"), last=True) == [Text("STO")]
    assert tiny().speech.start().push(tiny().id("a"), last=True) == [ItemStart("message"), Text("a")]


def test_a_header_that_the_limit_cuts_off_is_not_shown() -> None:
    parser = parser_after("<|channel|>anal")
    assert parser.push(tiny().id("y"), last=True) == []
    assert parser_after(f"{ANSWER}Hi<|end|>").push(tiny().id("<|start|>"), last=True) == []


# -- the grammar of headers -----------------------------------------------------------------

WORDS = ["assistant", "to=functions.f", "to=x", "<|channel|>final", "<|channel|>analysis", "<|constrain|>json", "code"]
GLUE = ["", " ", "\n", "<|channel|>", "<|constrain|>", "x"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, *GLUE]), max_size=9).map("".join))
def test_every_beginning_of_a_header_may_become_one(text: str) -> None:
    if read_header(text, role="assistant") is not None:
        assert all(may_become_header(text[:end]) for end in range(len(text) + 1) if not _splits_a_mark(text, end))


def _splits_a_mark(text: str, end: int) -> bool:
    """Marks are single tokens, so no header ends inside one."""
    return text.rfind("<|", 0, end) > text.rfind("|>", 0, end) or text[max(0, end - 1) : end + 1] == "<|"


def test_a_header_says_what_its_words_say() -> None:
    read = read_header("assistant to=functions.f<|channel|>commentary <|constrain|>json")
    assert read == Header("assistant", "commentary", "functions.f", "json")
    assert read_header("<|channel|>final") is None
    assert read_header("<|channel|>final", role="assistant") == Header("assistant", "final")
