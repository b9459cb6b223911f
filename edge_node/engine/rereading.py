"""What the next turn of a conversation will begin with, known as soon as an answer has ended.

An answer's positions were computed one by one, and models like gpt-oss drop their old reasoning from the
history, so what a slot holds at the end of an answer is not what the next prompt needs. While a node is idle it
reads that beginning through the chunk path; then the next turn finds it in the prefix store.
Does not know when that is done.
"""

from __future__ import annotations

from typing import NamedTuple

from core.conversation import Item, prefix_keys
from core.frames import Delta, Generate
from core.stream import output_items
from edge_node.engine.speech import Setting, Speech
from edge_node.engine.window import without_oldest


class Past(NamedTuple):
    """A finished answer; said[i] is what output[i] made the model say."""

    request: Generate
    dropped_items: int
    output: list[int]
    said: list[list[Delta]]


class Beginning(NamedTuple):
    """Ids that the next prompt begins with; keys[i] stands for the first ends[i] of them."""

    ids: list[int]
    keys: list[str]
    ends: list[int]


def setting_of(request: Generate) -> Setting:
    """What the request says about its answer as a whole."""
    return Setting(request.tools, request.format, request.effort)


def what_follows(past: Past, speech: Speech, release: str) -> Beginning:
    """The beginning that does not depend on what is said next; raises SpeechError."""
    request = past.request
    kept = without_oldest(request.items, past.dropped_items)
    items = [*kept, *output_items(request.stream, release, past.output, past.said)]
    prompt = speech.lay_out([*items, _next_item(items[-1])], release, setting_of(request))
    # Routers know a conversation by all its items; one that was cut goes by no name.
    named = request.prefix_keys and not past.dropped_items
    keys = prefix_keys(items, release, request.cache_salt) if named else []
    ends = prompt.ends[: len(items)]
    return Beginning(prompt.ids[: ends[-1]], keys, ends)


def _next_item(last: Item) -> Item:
    """Anything that may follow, since an answer that is not the last may be written differently."""
    if last.kind == "function_call":
        return Item("function_call_output", "tool", "", call_id=last.call_id)
    return Item("message", "user", "")
