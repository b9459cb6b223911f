from __future__ import annotations

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from edge_node.residents import MOST_TOLD, ResidentTable


def test_news_are_told_once_and_a_frame_at_a_time() -> None:
    residents = ResidentTable()
    many = [(str(key), 64) for key in range(MOST_TOLD + 1)]
    residents.update(many)
    assert residents.news() == many[:MOST_TOLD]
    assert residents.told() == many[:MOST_TOLD], "a new link hears the rest with the others"
    assert residents.news() == many[MOST_TOLD:]
    assert residents.news() == []
    assert residents.told() == many


def test_when_the_engine_has_ended_all_that_it_held_is_gone() -> None:
    residents = ResidentTable()
    residents.update([("a", 64), ("b", 128)])
    residents.news()
    residents.clear()
    assert residents.news() == [("a", 0), ("b", 0)]
    assert residents.told() == []


def test_what_came_and_went_between_two_frames_is_never_told() -> None:
    residents = ResidentTable()
    residents.update([("a", 64)])
    residents.update([("a", 0), ("b", 64)])
    assert residents.news() == [("b", 64)]


def test_links_never_hold_more_than_the_engine_lets_stand() -> None:
    residents = ResidentTable()
    for generation in range(3):
        residents.clear()
        residents.update([(f"{generation}-{key}", 64) for key in range(MOST_TOLD)])
        residents.news()
        assert len(residents.told()) <= MOST_TOLD
    while residents.news():
        assert len(residents.told()) <= MOST_TOLD
    assert len(residents.told()) == MOST_TOLD


class ResidentsMachine(RuleBasedStateMachine):
    """Links that come at any time, and hear what the node sends from then on, all hold the same."""

    changes = st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 3)))

    @initialize()
    def open(self) -> None:
        self.residents = ResidentTable()
        self.held: dict[str, int] = {}
        self.links: list[dict[str, int]] = []

    @rule(changes=changes)
    def update(self, changes: list[tuple[str, int]]) -> None:
        self.residents.update(changes)
        self.held.update(changes)

    @rule()
    def clear(self) -> None:
        self.residents.clear()
        self.held.clear()

    @rule()
    def a_link_comes(self) -> None:
        self.links.append(dict(self.residents.told()))

    @rule()
    def the_news_are_told(self) -> None:
        news = self.residents.news()
        held = {key: tokens for key, tokens in self.held.items() if tokens}
        for link in self.links:
            link.update(news)
            assert {key: tokens for key, tokens in link.items() if tokens} == held
        assert dict(self.residents.told()) == held


TestResidentsMachine = ResidentsMachine.TestCase
