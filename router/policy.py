"""Which node answers: the nearest that has a free slot, and of equally near ones that which remembers most.

Pure; a decision over `Node`s that are known to be ready. First version: nearness is the link's RTT.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from router.fleet import Node

# Below this an RTT difference is the scheduler's jitter, not distance: such nodes are equally near.
EQUALLY_NEAR_S = 0.001
# A full node's line is short while it is no longer than its slots: one round of answers to wait for.
SHORT_LINE_PER_SLOT = 1


PrefixKeys: TypeAlias = Callable[[str], Sequence[str]]
"""A conversation's `core.conversation.prefix_keys` under a release; asked only when it can decide."""


class Choice(NamedTuple):
    node: Node
    release: str

    @property
    def variant(self) -> str:
        return self.node.variant_of(self.release)


def no_keys(release: str) -> Sequence[str]:
    """The `PrefixKeys` of a conversation of which nothing is known."""
    return ()


def choose(
    ready: Iterable[Node],
    model: str,
    exclude: Collection[str] = (),
    prefix_keys: PrefixKeys = no_keys,
    yields: bool = False,
    variant: str = "",
    context_tokens: int = 0,
    promised: bool = False,
) -> Choice | None:
    """The node for a request of `model` (an alias, or a release named in full), or None.

    yields: the request gives way to all others, so it gets a free slot or nothing, and others do not see it.
    variant: what an answer was begun with; another one only if none of it can be had. context_tokens: the least
    that the node must hold. promised: it has been accepted once, so no line is too long for it.

    Free nodes come first: nearest, then the one whose prefix store holds most of the conversation,
    then emptiest, then by url. If all are full: the least loaded, while its line is short; what a node
    remembers is worth a way, never a wait.
    """
    able = [
        Choice(node, release)
        for node in ready
        if node.url not in exclude
        and node.hello.context_tokens >= context_tokens
        and (release := node.release_for(model)) is not None
    ]
    line_per_slot = 0.0 if yields else float("inf") if promised else 1.0 + SHORT_LINE_PER_SLOT
    alike = [choice for choice in able if choice.variant == variant]
    return _of(alike, prefix_keys, line_per_slot) or _of(able, prefix_keys, line_per_slot)


def _of(able: list[Choice], prefix_keys: PrefixKeys, line_per_slot: float) -> Choice | None:
    free = [choice for choice in able if choice.node.occupied < choice.node.slots]
    if free:
        reach_s = min(_rtt_s(choice) for choice in free) + EQUALLY_NEAR_S
        near = [choice for choice in free if _rtt_s(choice) <= reach_s]
        # With one node to take there is nothing to ask.
        return near[0] if len(near) == 1 else min(near, key=lambda choice: _strangeness(choice, prefix_keys))
    queueing = [choice for choice in able if choice.node.pressing < choice.node.slots * line_per_slot]
    return min(queueing, key=_crowding, default=None)


def _rtt_s(choice: Choice) -> float:
    """A node that was not measured yet counts as far, not as near."""
    return float("inf") if choice.node.rtt_s is None else choice.node.rtt_s


def _strangeness(choice: Choice, prefix_keys: PrefixKeys) -> tuple[int, float, str]:
    return -choice.node.resident_tokens(prefix_keys(choice.release)), *_crowding(choice)


def _crowding(choice: Choice) -> tuple[float, str]:
    return choice.node.pressing / max(1, choice.node.slots), choice.node.url
