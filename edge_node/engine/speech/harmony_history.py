"""What of a conversation gpt-oss is told again, and in which channel.

Reasoning is said again only until the answer it led to is complete: what stands before the last final message is
left out, calls and their outputs stay. (openai-harmony leaves out what stands before the *first* final message, and
only while the assistant spoke last in the final channel. Over several rounds that would keep, and bring back,
reasoning that the format says to drop.)

Does not know ids nor texts of messages.
"""

from __future__ import annotations

from collections.abc import Iterator

from core.conversation import Item
from edge_node.engine.speech.harmony_format import ANALYSIS, ASSISTANT, COMMENTARY, FINAL

_INSTRUCTING = ("system", "developer")


def instructs(item: Item) -> bool:
    """Whether it goes into a developer message: `system` is the model's maker's word, not a client's."""
    return item.kind == "message" and item.role in _INSTRUCTING


def opening_instructions(items: list[Item]) -> int:
    """How many of the first items instruct; they share one developer message."""
    return next((index for index, item in enumerate(items) if not instructs(item)), len(items))


def channels(items: list[Item]) -> list[str]:
    """Each item's channel, "" for those that have none.

    Clients often know no phases: what the assistant said just before a call is then a preamble, for the model
    itself ends its turn with a final message.
    """
    following: list[Item | None] = [*items[1:], None]
    return [_channel(item, after) for item, after in zip(items, following, strict=bool(items))]


def _channel(item: Item, after: Item | None) -> str:
    if item.kind == "reasoning":
        return ANALYSIS
    if item.kind != "message" or item.role != ASSISTANT:
        return "" if item.kind == "message" and item.role != "tool" else COMMENTARY
    calls = after is not None and after.kind == "function_call"
    return COMMENTARY if item.phase == "commentary" or (calls and not item.phase) else FINAL


def said_again(items: list[Item]) -> Iterator[tuple[Item, str] | None]:
    """Each item with its channel; None for reasoning that is over, or that has no text."""
    found = channels(items)
    last_final = max((index for index, channel in enumerate(found) if channel == FINAL), default=-1)
    for index, (item, channel) in enumerate(zip(items, found, strict=True)):
        over = channel == ANALYSIS and (index < last_final or not item.text)
        yield None if over else (item, channel)
