"""What the next turn of a conversation will begin with, known as soon as an answer has ended.

An answer's positions were computed one by one, and models like gpt-oss drop their old reasoning from the
history, so what a slot holds at the end of an answer is not what the next prompt needs. While a node is idle it
reads that beginning through the chunk path; then the next turn finds it in the prefix store.
Does not know when that is done, nor where blocks are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from core.conversation import Item, prefix_keys
from core.stream import output_items
from edge_node.engine.answer import Answer
from edge_node.engine.prepare import setting_of
from edge_node.engine.speech import Setting, Speech
from edge_node.engine.step import BLOCK_TOKENS
from edge_node.engine.window import without_oldest

MAX_PAST = 64


class Past(NamedTuple):
    """A conversation up to an answer that has ended.

    keys: by which routers know the first items, each longer than the one before; none if they do not. blocks: what
    it takes of the prefix store, about.
    """

    stream: str
    epoch: int
    items: list[Item]
    setting: Setting
    salt: str
    keys: list[str]
    blocks: int


class Beginning(NamedTuple):
    """Ids that the next prompt begins with; the i-th item ends with ids[:ends[i]]."""

    ids: list[int]
    ends: list[int]


def past_of(answer: Answer) -> Past:
    """What is kept of an answer that has ended: the items that its next turn will begin with."""
    request, sequence = answer.request, answer.sequence
    said = output_items(request.stream, request.release, sequence.output, answer.said)
    items = [*without_oldest(request.items, answer.dropped_items), *said]
    # Routers know a conversation by all its items; one that was cut goes by no name.
    named = request.prefix_keys and not answer.dropped_items
    keys = prefix_keys(items, request.release, request.cache_salt) if named else []
    blocks = sequence.tokens // BLOCK_TOKENS
    return Past(request.stream, request.epoch, items, setting_of(request), request.cache_salt, keys, blocks)


def what_follows(past: Past, speech: Speech, release: str) -> Beginning:
    """The beginning that does not depend on what is said next; raises SpeechError."""
    prompt = speech.lay_out([*past.items, _next_item(past.items[-1])], release, past.setting)
    ends = prompt.ends[: len(past.items)]
    return Beginning(prompt.ids[: ends[-1]], ends)


def _next_item(last: Item) -> Item:
    """Anything that may follow, since an answer that is not the last may be written differently."""
    if last.kind == "function_call":
        return Item("function_call_output", "tool", "", call_id=last.call_id)
    return Item("message", "user", "")


@dataclass(slots=True)
class _Entry:
    past: Past
    read: bool = False


class Pasts:
    """Conversations worth re-reading: the latest that fit into the prefix store together.

    Older ones would only put out what the later ones need, for the store forgets what was used first. Those that
    have been re-read stay on the list to be counted.
    """

    def __init__(self, capacity: int) -> None:
        """capacity: blocks of the prefix store."""
        self._capacity = capacity
        self._entries: list[_Entry] = []  # the latest last

    def __len__(self) -> int:
        """How many are still to be re-read."""
        return sum(not entry.read for entry in self._entries)

    def add(self, past: Past) -> None:
        """Take a conversation that has just gone on; its earlier state is forgotten."""
        goes_on_from = set(past.keys[:-1])
        latest_first = [_Entry(past)]
        room = self._capacity - past.blocks
        for entry in reversed(self._entries):
            if entry.past.keys and entry.past.keys[-1] in goes_on_from:
                continue
            room -= entry.past.blocks
            if room < 0 or len(latest_first) == MAX_PAST:
                break
            latest_first.append(entry)
        self._entries = latest_first[::-1]

    def take(self) -> Past | None:
        """The latest that was not re-read yet."""
        entry = next((entry for entry in reversed(self._entries) if not entry.read), None)
        if entry is None:
            return None
        entry.read = True
        return entry.past
