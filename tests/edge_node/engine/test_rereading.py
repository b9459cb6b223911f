"""What an idle engine reads for the next turn: the history as that turn will have it, and no more than can be kept."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from core.conversation import Item, prefix_keys
from core.frames import Arguments, Delta, Generate, ItemStart, Row, Text
from core.stream import output_items
from edge_node.engine.engine import EngineLimits
from edge_node.engine.speech import PLAIN, Parser, Rendered, Setting, Speech
from edge_node.engine.step import BLOCK_TOKENS
from tests.edge_node.engine.scripted import Node
from tests.fakes import STOP_ID, FakeParser, FakeRunner, FakeSpeech, generate

CONTEXT = 512


def node_of(speech: Speech | None = None, blocks: int = 64, context_tokens: int = CONTEXT) -> Node:
    limits = EngineLimits(
        slots=2,
        context_tokens=context_tokens,
        max_waiting=8,
        chunk_tokens=BLOCK_TOKENS,
        max_stall_ms=100.0,
        prefix_blocks=blocks,
    )
    return Node(limits, FakeRunner(2, context_tokens, blocks), speech)


def next_turn(node: Node, request: Generate, *more: Item) -> Generate:
    """The answer's items as the router keeps them, and what is said then."""
    rows = [output for output in node.outputs if isinstance(output, Row) and output.stream == request.stream]
    ids = [token for row in rows for token in row.ids]
    deltas = [said for row in rows for said in row.deltas]
    answer = output_items(request.stream, request.release, ids, deltas)
    return msgspec.structs.replace(request, stream="next", items=[*request.items, *answer, *more])


def tokens_read(node: Node) -> int:
    return sum(len(plan.chunk.ids) for plan in node.plans if plan.chunk)


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


# -- conversations that were cut ----------------------------------------------------------------

ITEMS = [
    Item("message", "system", "s" * 70),
    Item("message", "user", "u" * 150),
    Item("message", "assistant", "a" * 150),
    Item("message", "user", "v" * 150),
]
DROPPED = 2


def cut(**more: object) -> Generate:
    """A conversation whose middle has to go; its router knows it by all its items."""
    keys = prefix_keys(ITEMS, generate().release, "")
    request = generate("cut", items=ITEMS, truncation="auto", most=100, seed=5)
    return msgspec.structs.replace(request, prefix_keys=keys, **more)


def test_a_cut_conversation_goes_by_no_name() -> None:
    node = node_of()
    node.answer(cut())
    assert node.started("cut").dropped_items == DROPPED
    assert node.engine.take_chains() == [], "a key stands for all items, and not all were read"
    node.rest()
    assert node.engine.take_chains() == []


def test_an_answer_that_is_continued_under_its_cut_goes_by_no_name_either() -> None:
    node = node_of()
    node.answer(cut(dropped_items=DROPPED, output_ids=[5]))
    assert node.started("cut").dropped_items == DROPPED
    node.rest()
    assert node.engine.take_chains() == []


def test_whoever_brings_no_keys_is_given_none() -> None:
    node = node_of()
    node.answer(generate(text="x" * 100, most=100, seed=5))
    node.rest()
    assert node.engine.take_chains() == []


def test_what_was_dropped_is_not_read_again() -> None:
    node, request = node_of(), cut()
    node.answer(request)
    node.rest()
    following = next_turn(node, request, Item("message", "user", "and?"))
    following = msgspec.structs.replace(following, truncation="disabled", dropped_items=DROPPED)
    node.answer(following)
    said = len(node.ids("cut"))
    assert said > BLOCK_TOKENS
    assert node.started("next").cached_tokens == whole_blocks(70 + 150 + said)


# -- no more than can be kept -------------------------------------------------------------------


def test_of_a_long_beginning_only_what_the_store_can_hold_is_read_again() -> None:
    node, request = node_of(blocks=2), generate(text="u" * 60, most=200, seed=8)
    node.answer(request)
    assert 60 + len(node.ids()) >= 3 * BLOCK_TOKENS
    before = tokens_read(node)
    node.rest()
    assert tokens_read(node) - before == 2 * BLOCK_TOKENS
    following = next_turn(node, request, Item("message", "user", "and?"))
    node.answer(following)
    assert node.started("next").cached_tokens == 2 * BLOCK_TOKENS


class Lengthy(FakeSpeech):
    """Writes two blocks of words for an answer, once it is history."""

    def lay_out(self, items: list[Item], release: str, setting: Setting = PLAIN) -> Rendered:
        longer = [item if item.role == "user" else Item("message", "user", "w" * 2 * BLOCK_TOKENS) for item in items]
        return super().lay_out(longer, release, setting)


def test_a_beginning_longer_than_the_context_is_read_as_far_as_a_slot_goes() -> None:
    context_tokens = 2 * BLOCK_TOKENS
    node, request = node_of(Lengthy(), context_tokens=context_tokens), generate(text="u" * 100, most=9, seed=3)
    node.answer(request)
    before = tokens_read(node)
    node.rest()
    assert tokens_read(node) - before == BLOCK_TOKENS, "the first block was there"
    assert node.engine.take_faults() == []


# -- what comes next ----------------------------------------------------------------------------


class Caller(FakeSpeech):
    """Answers are calls. A call loses its first ids, as a model's reasoning may, unless its output is next."""

    lost = 10

    def lay_out(self, items: list[Item], release: str, setting: Setting = PLAIN) -> Rendered:
        kept = list[Item]()
        for item, after in zip(items, [*items[1:], None], strict=True):
            answered = after is not None and after.kind == "function_call_output" and after.call_id == item.call_id
            loses = item.kind == "function_call" and not answered
            kept.append(msgspec.structs.replace(item, ids=(item.ids or [])[self.lost :]) if loses else item)
        return super().lay_out(kept, release, setting)

    def start(self, stop: Sequence[str] = ()) -> Parser:  # type: ignore[override]
        return CallParser()


class CallParser(FakeParser):
    def push(self, token: int, last: bool = False) -> list[Delta]:
        as_message = super().push(token, last)
        return [_as_call(delta) for delta in as_message]


def _as_call(delta: Delta) -> Delta:
    match delta:
        case ItemStart():
            return ItemStart("function_call", name="look")
        case Text(text):
            return Arguments(text)
        case _:
            return delta


def test_after_a_call_its_output_is_expected() -> None:
    node, request = node_of(Caller()), generate(text="u" * 60, most=70, seed=5)
    node.answer(request)
    said = node.ids()
    assert len(said) == 70 and STOP_ID not in said
    assert whole_blocks(60 + 70) > whole_blocks(60 + 70 - Caller.lost), "or nothing would be seen"
    node.rest()
    following = next_turn(node, request)
    call = following.items[-1]
    assert call.kind == "function_call" and call.call_id
    output = Item("function_call_output", "tool", "sunny", call_id=call.call_id)
    node.answer(msgspec.structs.replace(following, items=[*following.items, output]))
    assert node.started("next").cached_tokens == whole_blocks(60 + 70)


def test_after_an_answer_the_users_next_question_is_expected() -> None:
    class Forgetful(FakeSpeech):
        """An answer loses its first ids as soon as the user speaks again."""

        def lay_out(self, items: list[Item], release: str, setting: Setting = PLAIN) -> Rendered:
            pairs = zip(items, [*items[1:], None], strict=True)
            loses = [after is not None and after.role == "user" for _, after in pairs]
            kept = [
                msgspec.structs.replace(item, ids=(item.ids or [])[10:]) if lost else item
                for item, lost in zip(items, loses, strict=True)
            ]
            return super().lay_out(kept, release, setting)

    node, request = node_of(Forgetful()), generate(text="u" * 60, most=70, seed=5)
    node.answer(request)
    assert len(node.ids()) == 70
    before = tokens_read(node)
    node.rest()
    assert tokens_read(node) - before == BLOCK_TOKENS, "120 ids have one whole block, 130 would have two"
    node.answer(next_turn(node, request, Item("message", "user", "and?")))
    assert node.started("next").cached_tokens == BLOCK_TOKENS
