"""Make a conversation fit the context, or say by how much it does not.

Rounds are dropped whole and oldest first; system and developer messages always stay. Does not know
how items become ids: it is handed the function, which may raise ContextTooLong for what it will not even try.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from core.conversation import Item
from core.errors import ContextTooLong
from edge_node.engine.speech import Rendered

LayOut: TypeAlias = Callable[[list[Item]], Rendered]

_KEPT_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Fitted:
    """A prompt, and how many of the oldest items that may be dropped were."""

    prompt: Rendered
    dropped_items: int


def fit(items: list[Item], lay_out: LayOut, context_tokens: int, dropped_items: int) -> Fitted:
    """Exactly this cut, with room for one output id; raises ContextTooLong."""
    prompt = lay_out(without_oldest(items, dropped_items))
    if len(prompt.ids) + 1 > context_tokens:
        raise ContextTooLong(len(prompt.ids), context_tokens)
    return Fitted(prompt, dropped_items)


def fit_by_dropping(
    items: list[Item], lay_out: LayOut, context_tokens: int, room_tokens: int, least_dropped: int
) -> Fitted:
    """The smallest cut of at least `least_dropped` items that leaves room for an answer.

    The last round is never dropped; if it alone leaves less room, it is kept all the same, as long as
    one output id fits. Raises ContextTooLong.
    """
    cuts = [cut for cut in cuts_of(items) if cut >= least_dropped] or [least_dropped]
    prompts: dict[int, Rendered] = {}

    def fits(cut: int) -> bool:
        try:
            prompts[cut] = lay_out(without_oldest(items, cut))
        except ContextTooLong:
            return False
        return len(prompts[cut].ids) + room_tokens <= context_tokens

    if not fits(cuts[0]):
        # Dropping more never makes the prompt longer, so the cuts can be searched by halves.
        at = bisect_left(cuts, True, lo=1, key=fits)
        cuts = cuts[min(at, len(cuts) - 1) :]
    prompt = prompts.get(cuts[0]) or lay_out(without_oldest(items, cuts[0]))
    if len(prompt.ids) + 1 > context_tokens:
        raise ContextTooLong(len(prompt.ids), context_tokens)
    return Fitted(prompt, cuts[0])


def without_oldest(items: list[Item], dropped_items: int) -> list[Item]:
    """The items less the oldest `dropped_items` of those that may be dropped."""
    kept, left = [], dropped_items
    for item in items:
        if left and not _stays(item):
            left -= 1
        else:
            kept.append(item)
    return kept


def cuts_of(items: list[Item]) -> list[int]:
    """How many items can be dropped without tearing a round: 0, after the first round, ... before the last."""
    droppable = [item for item in items if not _stays(item)]
    starts = [
        index for index, item in enumerate(droppable) if index and _asks(item) and not _asks(droppable[index - 1])
    ]
    return [0, *starts]


def _stays(item: Item) -> bool:
    return item.kind == "message" and item.role in _KEPT_ROLES


def _asks(item: Item) -> bool:
    return item.kind == "message" and item.role == "user"
