from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_node.engine.speech.stop_strings import StopStrings


def shown(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """What each piece shows, the rest flushed, and whether a stop string was found."""
    watch, out = StopStrings(stops), list[str]()
    for piece in pieces:
        out.append(watch.push(piece))
        if watch.found:
            return out, True
    return [*out, watch.flush()], False


def test_text_before_the_stop_string_is_shown_and_nothing_of_it() -> None:
    assert shown(["one tw", "o EN", "D three"], ["END"]) == (["one tw", "o ", ""], True)


def test_what_only_began_like_a_stop_string_is_shown_after_all() -> None:
    assert shown(["a\n", "\n", "b"], ["\n\n\n"]) == (["a", "", "\n\nb", ""], False)
    assert shown(["wait EN"], ["END"]) == (["wait ", "EN"], False)


def test_the_stop_string_that_is_complete_first_counts() -> None:
    assert shown(["abcd"], ["abcd", "bc"]) == (["a"], True)


def test_empty_stop_strings_stop_nothing() -> None:
    assert shown(["a", "b"], [""]) == (["a", "b", ""], False)


_letters = st.text(alphabet="ab", max_size=8)


@given(st.lists(_letters), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_how_the_text_is_split_does_not_matter(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    whole, found = shown(list(text), stops)
    split, split_found = shown(pieces, stops)
    assert ("".join(split), split_found) == ("".join(whole), found)
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert found == bool(ends)
    if ends:
        before = text[: min(ends)]
        longest = max(len(stop) for stop in stops if before.endswith(stop))
        assert "".join(split) == before[: len(before) - longest]
    else:
        assert "".join(split) == text
