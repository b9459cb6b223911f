"""gpt-oss speech against openai-harmony 0.0.8, over the genuine vocabulary.

Where ours differs on purpose:

prompts
- no `Current date`: a prompt is a pure function of the request (the library writes none unless told a date)
- reasoning before the last final message is dropped; the library drops what stands before the first one, and only
  while the assistant's last message is final
- instructions that open a conversation share one developer message, with a blank line between them
- the answer's format: the library has no field for it
- reasoning without text is not said again, and `system` items are the developer's

answers
- a role other than the assistant's, a channel that is none of the three, and a header with words that mean nothing
  are text as they stand; the library keeps any role and channel, and takes a lone word for a recipient
- `<|constrain|> json` (the library's own documentation writes it so) is a content type; the library raises
- a terminator or `<|start|>` inside a header ends it; the library waits for `<|message|>`
- where the library raises, ours goes on: `test_nothing_of_an_answer_is_lost` says how
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from core.conversation import Item
from edge_node.engine.speech.harmony_format import ASSISTANT, CHANNEL, MESSAGE, START, item_of, read_header
from edge_node.engine.speech.setting import Setting
from tests.edge_node.engine.speech.harmony_conversations import conversation, setting, text
from tests.edge_node.engine.speech.harmony_oracle import Heard, Oracle
from tests.edge_node.engine.speech.harmony_speeches import (
    RELEASE,
    Vocabulary,
    check_one_text_an_id,
    genuine,
    joined,
    stored,
    tiny,
)

ROOT = Path(__file__).resolve().parents[4]
FEW, MANY = 300, 10_000
TERMINATORS = ("<|end|>", "<|call|>", "<|return|>")


@pytest.fixture(scope="module")
def tokenizer_json() -> Path:
    script = [sys.executable, "scripts/get-tokenizer"]
    return ROOT / subprocess.run(script, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@pytest.fixture(scope="module")
def oracle(tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle.load(tokenizer_json, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def words(tokenizer_json: Path) -> Vocabulary:
    return genuine(tokenizer_json)


# -- prompts --------------------------------------------------------------------------------


def is_final(item: Item) -> bool:
    return item.kind == "message" and item.role == "assistant" and item.phase != "commentary"


def without_old_reasoning(items: list[Item]) -> list[Item]:
    last = max((index for index, item in enumerate(items) if is_final(item)), default=0)
    return [item for index, item in enumerate(items) if item.kind != "reasoning" or index >= last]


def library_drops_alike(items: list[Item]) -> bool:
    """Its rule and ours are the same when there is at most one final message, and nothing was said after it."""
    said = [item for item in items if item.role == "assistant"]
    finals = [item for item in said if is_final(item)]
    return not finals or (len(finals) == 1 and said[-1] is finals[0])


def compare_prompts(words: Vocabulary, oracle: Oracle, seed: int) -> bool:
    """True where the library itself dropped the reasoning."""
    random = Random(seed)
    items, asked = conversation(random), setting(random)
    alike = library_drops_alike(items)
    expected = oracle.prompt(items if alike else without_old_reasoning(items), asked, drop=alike)
    assert words.speech.lay_out(items, RELEASE, asked).ids == expected, f"seed {seed}"
    return alike and any(item.kind == "reasoning" for item in items)


def test_prompts_are_the_library_s_id_for_id(words: Vocabulary, oracle: Oracle) -> None:
    alike = [compare_prompts(words, oracle, seed) for seed in range(FEW)]
    assert any(alike) and not all(alike)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_prompts_are_the_library_s_id_for_id(words: Vocabulary, oracle: Oracle) -> None:
    for seed in range(FEW, FEW + MANY):
        compare_prompts(words, oracle, seed)


def test_the_tiny_vocabulary_writes_the_same_text(words: Vocabulary) -> None:
    for seed in range(60):
        random = Random(seed)
        items, asked = conversation(random), setting(random)
        small, large = tiny().speech.lay_out(items, RELEASE, asked), words.speech.lay_out(items, RELEASE, asked)
        assert tiny().text(small.ids) == words.text(large.ids)
        assert [tiny().text(small.ids[:end]) for end in small.ends] == [
            words.text(large.ids[:end]) for end in large.ends
        ]


# -- answers --------------------------------------------------------------------------------

HEADERS = [
    *["<|channel|>analysis", "<|channel|>final", "<|channel|>commentary"] * 3,
    *["<|channel|>commentary to=functions.look <|constrain|>json", " to=functions.look<|channel|>commentary"] * 2,
    " to=functions.get_weather<|channel|>commentary <|constrain|>json",
    "<|channel|>analysis to=python code",
    "<|channel|>analysis to=browser.search<|constrain|>json",
    "<|channel|>commentary to=functions.日本",
    "",
    # what no model should write
    "<|channel|>thinking",
    "<|channel|>final json",
    "<|channel|>analysis<|channel|>final",
    " hello",
    "<|channel|>",
    "<|channel|>commentary to=functions.look <|constrain|> json",
]
ROLES = [*["assistant"] * 8, "user", "functions.look to=assistant", "nobody", ""]
TO = r"( to=[^\s<]+)"
TYPE = r"( ?<\|constrain\|>json| code)"
CHANNELS = r"(<\|channel\|>(analysis|commentary|final))"
WELL_FORMED = re.compile(rf"(<\|start\|>assistant)?({CHANNELS}|{TO}{CHANNELS}?{TYPE}?|{CHANNELS}{TO}{TYPE}?)?")


def answer(random: Random) -> str:
    """A few messages, mostly as the format says."""
    messages = [
        (f"<|start|>{random.choice(ROLES)}" if index else "")
        + f"{random.choice(HEADERS)}<|message|>{text(random, 6)}{random.choice(TERMINATORS)}"
        for index in range(random.randint(1, 4))
    ]
    return "".join(messages)


def garbled(random: Random, ids: list[int], special: list[int]) -> list[int]:
    """The same with ids lost, repeated, moved and thrown in."""
    ids = list(ids)
    for _ in range(random.choice([0, 0, 1, 1, 2, 5])):
        at = random.randrange(len(ids) + 1)
        match random.randrange(4):
            case 0:
                ids[at : at + 1] = []
            case 1:
                ids[at:at] = [random.choice(special)]
            case 2:
                ids[at:at] = [random.randrange(199_998)]
            case _:
                ids[at:at] = ids[at : at + random.randint(1, 4)]
    return ids


def special_ids(words: Vocabulary) -> list[int]:
    texts = [START, CHANNEL, MESSAGE, "<|constrain|>", *TERMINATORS, "<|endoftext|>"]
    return [words.id(special) for special in texts]


def mapped(heard: Heard) -> tuple[str, str, str]:
    """PROTOCOL section 3, of what the library heard."""
    if re.match(r"functions\..", heard.recipient):
        return "function_call", "", heard.recipient.removeprefix("functions.")
    if heard.recipient:
        return "message", "commentary", ""
    kinds = {"analysis": ("reasoning", ""), "commentary": ("message", "commentary")}
    kind, phase = kinds.get(heard.channel, ("message", "final_answer" if heard.channel else ""))
    return kind, phase, ""


def headers_of(words: Vocabulary, ids: list[int]) -> list[str] | None:
    """The messages' headers, spelled; None where a terminator or a start stands in one."""
    start, message = words.id(START), words.id(MESSAGE)
    ends = [words.id(terminator) for terminator in TERMINATORS]
    headers: list[str] = []
    rest = ids
    while rest:
        if message not in rest:
            return None
        at = rest.index(message)
        header = rest[:at]
        if any(end in header for end in ends) or start in header[1:] or (not headers and header[:1] == [start]):
            return None
        headers.append(words.text(header))
        end = next((index for index in range(at, len(rest)) if rest[index] in ends), len(rest) - 1)
        rest = rest[end + 1 :]
    return headers


def compare_answers(words: Vocabulary, oracle: Oracle, seed: int) -> tuple[int, int]:
    """How many messages had to be equal, and how many were text because their header is none of ours."""
    random = Random(seed)
    ids = garbled(random, words.ids(answer(random)), special_ids(words))
    if ids[-1:] not in ([words.id(terminator)] for terminator in TERMINATORS):
        ids.append(words.id("<|return|>"))
    theirs, headers = oracle.hear(ids), headers_of(words, ids)
    if theirs is None or headers is None:
        return 0, 0
    ours = joined(words.hear(ids))
    assert len(ours) == len(theirs) == len(headers), f"seed {seed}"
    equal = 0
    for mine, heard, header in zip(ours, theirs, headers, strict=True):
        if WELL_FORMED.fullmatch(header):
            assert mine == (*mapped(heard), heard.text), f"seed {seed}"
            equal += 1
        elif mine[3] != heard.text:
            assert mine == ("message", "", "", f"{header}<|message|>{heard.text}"), f"seed {seed}"
    return equal, len(ours) - equal


def test_answers_are_heard_as_the_library_hears_them(words: Vocabulary, oracle: Oracle) -> None:
    counts = [compare_answers(words, oracle, seed) for seed in range(2 * FEW)]
    assert sum(equal for equal, _ in counts) > FEW and sum(text for _, text in counts) > FEW // 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_answers_are_heard_as_the_library_hears_them(words: Vocabulary, oracle: Oracle) -> None:
    for seed in range(2 * FEW, 2 * FEW + 2 * MANY):
        compare_answers(words, oracle, seed)


def heard_at_once(words: Vocabulary, ids: list[int]) -> list[tuple[str, str, str, str]]:
    """What the parser must come to, told of a whole answer: cut at terminators, then at starts, then at the message."""
    start, channel, message = (words.id(special) for special in (START, CHANNEL, MESSAGE))
    items: list[tuple[str, str, str, str]] = []
    for index, segment in enumerate(split(ids, [words.id(terminator) for terminator in TERMINATORS])):
        at = segment.index(message) if message in segment else len(segment)
        *loose, head = split_before(segment[:at], start)
        items += [("message", "", "", words.text(piece)) for piece in loose if piece]
        implied = (index == 0 and not loose) or head[:1] == [channel]
        role = ASSISTANT if implied and head[:1] != [start] else ""
        read = read_header(words.text(head).removeprefix(START), role) if at < len(segment) else None
        if read is not None and (role or head[:1] == [start]):
            start_of_item = item_of(read)
            items.append((start_of_item.kind, start_of_item.phase, start_of_item.name, words.text(segment[at + 1 :])))
        elif rest := head + segment[at:]:
            items.append(("message", "", "", words.text(rest)))
    return items


def split(ids: list[int], at: list[int]) -> list[list[int]]:
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token in at:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces


def split_before(ids: list[int], at: int) -> list[list[int]]:
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token == at:
            pieces.append([])
        pieces[-1].append(token)
    return pieces


def compare_with_all_at_once(words: Vocabulary, seed: int) -> None:
    random = Random(seed)
    ids = garbled(random, words.ids(answer(random)), special_ids(words))
    if random.random() < 0.2:
        ids = [random.choice([*special_ids(words), random.randrange(199_998)]) for _ in range(random.randrange(60))]
    ids.append(words.id("<|end|>"))
    deltas = words.hear(ids)
    check_one_text_an_id(deltas)
    assert joined(deltas) == heard_at_once(words, ids), f"seed {seed}"


def test_nothing_of_an_answer_is_lost(words: Vocabulary) -> None:
    for seed in range(2 * FEW):
        compare_with_all_at_once(words, seed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_of_many_answers_is_lost(words: Vocabulary) -> None:
    for seed in range(2 * FEW, 2 * FEW + 2 * MANY):
        compare_with_all_at_once(words, seed)


# -- both ways ------------------------------------------------------------------------------


def test_what_is_rendered_is_heard_again(words: Vocabulary) -> None:
    for seed in range(60):
        random = Random(seed)
        items = [item for item in conversation(random, 1) if item.role == "assistant"]
        for item in items:
            before = words.speech.lay_out([], RELEASE).ids
            ids = words.speech.lay_out([item], RELEASE).ids[len(before) - 2 :]
            ids = ids[2:-2]
            expected = (item.kind, "final_answer" if is_final(item) else item.phase, item.name, item.text)
            assert joined(words.hear(ids)) == [expected]


def test_a_tool_round_is_re_read_in_the_ids_it_was_made_of(words: Vocabulary) -> None:
    """With headers as the library writes them; core/stream keeps no header ids."""
    prompt = words.speech.lay_out([Item("message", "user", "hi")], RELEASE).ids
    said = "<|channel|>analysis<|message|>Hm, ok<|end|><|start|>assistant to=functions.look<|channel|>commentary"
    ids = words.ids(said + ' <|constrain|>json<|message|>{"q"') + words.ids(": ") + words.ids("1}<|call|>")
    items = [Item("message", "user", "hi"), *stored(ids, words.hear(ids))]
    again = words.speech.lay_out(items, RELEASE, Setting()).ids
    assert again[: len(prompt) + len(ids)] == prompt + ids
