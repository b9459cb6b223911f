from __future__ import annotations

from functools import cache

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_node.engine.chains import Chains
from edge_node.engine.prefix_store import PrefixStore, block_keys
from edge_node.engine.step import BLOCK_TOKENS


def chain(*path: int) -> list[bytes]:
    """The keys of a prompt whose i-th block is all path[i]."""
    return list(_chain(path))


@cache
def _chain(path: tuple[int, ...]) -> list[bytes]:
    return block_keys("", [step for step in path for _ in range(BLOCK_TOKENS)])


def three_blocks(store: PrefixStore) -> list[bytes]:
    keys = chain(1, 2, 3)
    store.insert(keys)
    return keys


def test_a_key_is_told_with_the_whole_blocks_that_it_covers() -> None:
    store = PrefixStore(8)
    chains = Chains(store)
    chains.note(
        ["less than a block", "one and a half", "all", "more than there is"], [63, 96, 192, 640], three_blocks(store)
    )
    assert chains.changes() == [("one and a half", 64), ("all", 192), ("more than there is", 192)]


def test_nothing_is_told_twice() -> None:
    store = PrefixStore(8)
    chains = Chains(store)
    blocks = three_blocks(store)
    chains.note(["key"], [192], blocks)
    assert chains.changes() == [("key", 192)]
    assert chains.changes() == []
    chains.note(["key"], [192], blocks)
    assert chains.changes() == []


def test_what_is_evicted_is_told_as_shorter_and_then_as_gone() -> None:
    store = PrefixStore(3)
    chains = Chains(store)
    chains.note(["key"], [192], three_blocks(store))
    chains.changes()
    store.insert(chain(4, 5))
    assert chains.changes() == [("key", 64)]
    store.insert(chain(6, 7))
    assert chains.changes() == [("key", 0)]
    assert chains.changes() == []


def test_a_chain_that_is_noted_before_it_is_resident_is_told_when_it_is() -> None:
    store = PrefixStore(8)
    chains = Chains(store)
    chains.note(["key"], [130], chain(1, 2, 3))
    assert chains.changes() == []
    three_blocks(store)
    assert chains.changes() == [("key", 128)]


def test_the_keys_noted_longest_ago_are_forgotten_and_told_as_gone() -> None:
    store = PrefixStore(8)
    chains = Chains(store, most=2)
    blocks = three_blocks(store)
    chains.note(["shared", "old"], [64, 128], blocks)
    assert chains.changes() == [("shared", 64), ("old", 128)]
    chains.note(["shared", "young"], [64, 192], blocks)
    assert chains.changes() == [("old", 0), ("young", 192)]
    assert len(chains) == 2


def test_a_note_changed_under_its_giver_is_not_changed_here() -> None:
    store = PrefixStore(8)
    chains = Chains(store)
    blocks = three_blocks(store)
    chains.note(["key"], [192], blocks)
    blocks.clear()
    assert chains.changes() == [("key", 192)]


class ChainsMachine(RuleBasedStateMachine):
    """Whoever applies every change holds what a full count of the store gives."""

    paths = st.lists(st.integers(0, 2), max_size=5)

    @initialize(capacity=st.integers(0, 8), most=st.integers(1, 6))
    def open(self, capacity: int, most: int) -> None:
        self.most = most
        self.store = PrefixStore(capacity)
        self.chains = Chains(self.store, most)
        self.noted: dict[str, tuple[int, list[bytes]]] = {}
        self.heard: dict[str, int] = {}

    @rule(path=paths)
    def insert(self, path: list[int]) -> None:
        self.store.insert(chain(*path))

    @rule(path=paths, more=st.lists(st.integers(0, 7), max_size=4), tokens=st.integers(0, 100))
    def note(self, path: list[int], more: list[int], tokens: int) -> None:
        keys, ends = [f"key {key}" for key in more], [tokens * (place + 1) for place in range(len(more))]
        blocks = chain(*path)
        self.chains.note(keys, ends, blocks)
        for key, end in zip(keys, ends, strict=True):
            self.noted.pop(key, None)
            self.noted[key] = (end, blocks)
        self.noted = dict(list(self.noted.items())[-self.most :])

    @rule()
    def listen(self) -> None:
        for key, tokens in self.chains.changes():
            assert self.heard.get(key, 0) != tokens
            if tokens:
                self.heard[key] = tokens
            else:
                del self.heard[key]
            assert len(self.heard) <= self.most, "who is gone is told first"
        lengths = {
            key: BLOCK_TOKENS * min(self.store.resident(blocks), end // BLOCK_TOKENS)
            for key, (end, blocks) in self.noted.items()
        }
        assert self.heard == {key: tokens for key, tokens in lengths.items() if tokens}

    @invariant()
    def there_are_not_more_keys_than_agreed(self) -> None:
        assert len(self.chains) <= self.most


TestChainsMachine = ChainsMachine.TestCase
