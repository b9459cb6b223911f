from __future__ import annotations

from itertools import accumulate

import pytest

from core.conversation import Item
from core.errors import ContextTooLong
from edge_node.engine.speech import Rendered
from edge_node.engine.window import cuts_of, fit, fit_by_dropping, without_oldest


def said(*roles: str) -> list[Item]:
    return [Item("message", role, role[0] * 10) for role in roles]


def lay_out(items: list[Item]) -> Rendered:
    ends = list(accumulate(len(item.text) for item in items))
    return Rendered([1] * ends[-1], ends)


def test_rounds_begin_where_a_user_speaks_after_somebody_else() -> None:
    assert cuts_of(said("system", "user", "user", "assistant", "user", "assistant", "user")) == [0, 3, 5]


def test_system_messages_stay_wherever_they_stand() -> None:
    kept = without_oldest(said("system", "user", "assistant", "developer", "user"), 2)
    assert [item.role for item in kept] == ["system", "developer", "user"]


@pytest.mark.parametrize(("context", "dropped"), [(60, 0), (52, 0), (51, 2), (32, 2), (31, 4), (11, 4)])
def test_as_few_rounds_as_possible_are_dropped(context: int, dropped: int) -> None:
    items = said("user", "assistant", "user", "assistant", "user")
    fitted = fit_by_dropping(items, lay_out, context, 2, 0)
    assert (fitted.dropped_items, len(fitted.prompt.ids)) == (dropped, 50 - 10 * dropped)


def test_the_last_round_is_never_dropped() -> None:
    with pytest.raises(ContextTooLong) as caught:
        fit_by_dropping(said("user", "assistant", "user"), lay_out, 10, 1, 0)
    assert (caught.value.have, caught.value.most) == (10, 10)


def test_a_cut_that_was_made_before_is_kept_even_if_less_would_do() -> None:
    fitted = fit(said("user", "assistant", "user"), lay_out, 100, 2)
    assert (fitted.dropped_items, len(fitted.prompt.ids)) == (2, 10)


def test_a_conversation_without_rounds_is_rendered_whole() -> None:
    assert fit_by_dropping(said("assistant"), lay_out, 11, 1, 0).dropped_items == 0


def test_a_cut_that_is_refused_unread_does_not_fit() -> None:
    def lay_out_short(items: list[Item]) -> Rendered:
        if len(lay_out(items).ids) > 20:
            raise ContextTooLong(20, 20, at_least=True)
        return lay_out(items)

    items = said("user", "assistant", "user", "assistant", "user")
    assert fit_by_dropping(items, lay_out_short, 20, 2, 0).dropped_items == 4
    with pytest.raises(ContextTooLong, match="at least 20"):
        fit_by_dropping([Item("message", "user", "u" * 30)], lay_out_short, 20, 2, 0)
