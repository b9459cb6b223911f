from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import assume, given
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_node.engine.prefix_store import PrefixStore, block_keys
from edge_node.engine.step import BLOCK_TOKENS

A_FEW_BLOCKS = st.lists(st.integers(0, 2**31), max_size=4 * BLOCK_TOKENS)


def ids_of(path: list[int]) -> list[int]:
    """A prompt whose i-th block is all path[i]."""
    return [step for step in path for _ in range(BLOCK_TOKENS)]


# -- keys --------------------------------------------------------------------------------------


@given(A_FEW_BLOCKS, st.text(max_size=3))
def test_each_whole_block_has_a_key_that_longer_prompts_share(ids: list[int], salt: str) -> None:
    keys = block_keys(salt, ids)
    assert len(keys) == len(ids) // BLOCK_TOKENS == len(set(keys))
    assert block_keys(salt, ids + ids)[: len(keys)] == keys


@given(st.data())
def test_a_key_depends_on_every_id_up_to_its_blocks_end_and_on_none_after(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 2**31), min_size=3 * BLOCK_TOKENS, max_size=3 * BLOCK_TOKENS))
    place = data.draw(st.integers(0, len(ids) - 1))
    other = [*ids[:place], ids[place] + 1, *ids[place + 1 :]]
    same = [one == two for one, two in zip(block_keys("", ids), block_keys("", other), strict=True)]
    assert same == [block < place // BLOCK_TOKENS for block in range(3)]


@given(A_FEW_BLOCKS, st.text(max_size=3), st.text(max_size=3))
def test_another_salt_shares_no_key(ids: list[int], salt: str, other: str) -> None:
    assume(salt != other)
    assert not set(block_keys(salt, ids)) & set(block_keys(other, ids))


# -- the store ---------------------------------------------------------------------------------


def test_a_store_without_blocks_holds_nothing() -> None:
    store = PrefixStore(0)
    keys = block_keys("", ids_of([1, 2]))
    assert store.insert(keys) == (0, [])
    assert store.match(keys) == []
    assert store.generation == 0
    store.check_invariants()


def test_a_chain_longer_than_the_store_keeps_its_beginning() -> None:
    store = PrefixStore(2)
    keys = block_keys("", ids_of([1, 2, 3]))
    first, blocks = store.insert(keys)
    assert (first, len(blocks)) == (0, 2)
    assert store.match(keys) == blocks
    assert store.insert(keys) == (2, [])


def test_a_chains_deepest_block_goes_first_and_a_used_chain_last() -> None:
    store = PrefixStore(4)
    ours, theirs, new = (block_keys("", ids_of(path)) for path in ([1, 2], [3, 4], [5]))
    store.insert(ours)
    store.insert(theirs)
    store.match(ours)
    store.insert(new)
    assert [store.resident(keys) for keys in (ours, theirs, new)] == [2, 1, 1]


def test_looking_does_not_count_as_using() -> None:
    store = PrefixStore(2)
    old, young, new = (block_keys("", ids_of([path])) for path in (1, 2, 3))
    store.insert(old)
    store.insert(young)
    assert store.resident(old) == 1
    store.insert(new)
    assert store.resident(old) == 0


def test_another_continuation_keeps_the_shared_beginning_and_replaces_the_rest() -> None:
    store = PrefixStore(3)
    one, other = block_keys("", ids_of([1, 2, 3])), block_keys("", ids_of([1, 2, 4]))
    _, blocks = store.insert(one)
    assert store.insert(other) == (2, [blocks[2]])
    assert store.match(other) == blocks


class StoreMachine(RuleBasedStateMachine):
    """The store against a plain model: by path the block and when it was last used, looked through in full.

    Few different blocks and short paths, so that chains often share their beginnings and evict one another.
    """

    paths = st.lists(st.integers(0, 2), max_size=6)
    salts = st.sampled_from(["", "tenant"])

    @initialize(capacity=st.integers(0, 9))
    def open(self, capacity: int) -> None:
        self.capacity = capacity
        self.store = PrefixStore(capacity)
        self.blocks: dict[tuple[str, ...], int] = {}
        self.used: dict[tuple[str, ...], int] = {}
        self.clock = 0

    def chain(self, salt: str, path: list[int]) -> list[tuple[str, ...]]:
        steps = [salt, *map(str, path)]
        return [tuple(steps[: depth + 2]) for depth in range(len(path))]

    def run_of(self, chain: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        run = []
        for node in chain:
            if node not in self.blocks:
                break
            run.append(node)
        return run

    def use(self, run: list[tuple[str, ...]]) -> None:
        for node in reversed(run):
            self.clock += 1
            self.used[node] = self.clock

    @rule(salt=salts, path=paths)
    def match(self, salt: str, path: list[int]) -> None:
        generation = self.store.generation
        run = self.run_of(self.chain(salt, path))
        assert self.store.match(block_keys(salt, ids_of(path))) == [self.blocks[node] for node in run]
        assert self.store.generation == generation
        self.use(run)

    @rule(salt=salts, path=paths)
    def look(self, salt: str, path: list[int]) -> None:
        assert self.store.resident(block_keys(salt, ids_of(path))) == len(self.run_of(self.chain(salt, path)))

    @rule(salt=salts, path=paths)
    def insert(self, salt: str, path: list[int]) -> None:
        generation = self.store.generation
        chain = self.chain(salt, path)
        run = self.run_of(chain)
        missing = chain[len(run) : self.capacity]
        self.use(run)
        for _ in range(len(self.blocks) + len(missing) - self.capacity):
            oldest = min((node for node in self.blocks if node not in run), key=self.used.__getitem__)
            del self.blocks[oldest], self.used[oldest]
        first, blocks = self.store.insert(block_keys(salt, ids_of(path)))
        assert (first, len(blocks)) == (len(run), len(missing))
        assert not set(blocks) & set(self.blocks.values()), "only blocks that nobody's ids are in are given out"
        self.blocks.update(zip(missing, blocks, strict=True))
        self.use(run + missing)
        assert (self.store.generation != generation) == bool(missing)

    @invariant()
    def the_top_of_the_tree_is_resident(self) -> None:
        assert len(self.store) == len(self.blocks) <= self.capacity
        assert all(len(node) == 2 or node[:-1] in self.blocks for node in self.blocks)
        self.store.check_invariants()


TestStoreMachine = StoreMachine.TestCase
