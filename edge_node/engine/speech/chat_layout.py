"""Prompts from templates that see placeholders: their ids, and after how many of them each message has been said.

A template's text does not say where the words after one message end and those before the next begin:

    <|im_start|>user[0]<|im_end|><|im_start|>assistant
                       |after [0]|before the answer  |

What belongs to a message is what the template writes for the same messages with nothing to follow. And what it
writes at all may depend on what follows (Mistral's put the system message before the last question), so that no end
lies behind the first id that changes when the conversation goes on. All of it is compared in ids: a border between
words need not be one between ids.

Does not know items, nor what fills the template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from edge_node.engine.speech.prompt import Prompt, PromptEncoder
from edge_node.engine.speech.rendered import Rendered

Fill: TypeAlias = Callable[[list[str], bool], str | None]
"""Roles, and whether the answer's beginning is written, to a text with `placeholder`s; None if it is refused."""

_PLACEHOLDER = "\ue000item {}\ue001"
_PLACEHOLDERS = re.compile("\ue000item ([0-9]+)\ue001")

_GOING_ON = (["user"], ["assistant"], ["assistant", "user"])
"""Roles that may follow."""


class Said(msgspec.Struct, frozen=True):
    """One message as the template will see it; ids where this release generated it."""

    role: str
    text: str
    ids: list[int] | None


@dataclass(frozen=True, slots=True)
class _Words:
    """Words of the template: ids `at` and following, written by a prompt that was as `before`."""

    at: int
    ids: list[int]
    before: Prompt

    def common(self, others: str) -> int:
        """How many ids, from the prompt's first, stay if these words are others, whatever follows them."""
        other = self.before.branch()
        start = other.count
        other.write(others)
        return self.at + _common(self.ids, other.ids_from(start))


def placeholder(message: int) -> str:
    """What stands for a message's content in a filled template."""
    return _PLACEHOLDER.format(message)


def lay_out(encoder: PromptEncoder, text: str, said: list[Said], fill: Fill) -> Rendered:
    """The prompt of a filled template, and where each message ends."""
    pieces = _PLACEHOLDERS.split(text)
    prompt, words, starts = encoder.start(), list[_Words](), list[int]()
    for index, piece in enumerate(pieces):
        starts.append(prompt.count)
        if index % 2 == 0:
            before = prompt.branch()
            prompt.write(piece)
            words.append(_Words(starts[-1], prompt.ids_from(starts[-1]), before))
        elif (ids := said[int(piece)].ids) is not None:
            prompt.repeat(ids)
        else:
            prompt.say(said[int(piece)].text)
    ends = _ends([message.role for message in said], pieces, words, starts, fill)
    return Rendered(prompt.finish(), ends)


def _ends(roles: list[str], pieces: list[str], words: list[_Words], starts: list[int], fill: Fill) -> list[int]:
    most = min(_unchanged(fill([*roles, *more], True), pieces, words, starts) for more in _GOING_ON)
    after = {role: _words_after(last, roles, fill) for role, last in _last_of_each(roles).items()}
    ends, at = list[int](), 0
    for message in range(len(roles)):
        # The words before the first message that is later than this one.
        while at + 1 < len(words) and int(pieces[2 * at + 1]) <= message:
            at += 1
        end = words[at].common(after[roles[int(pieces[2 * at - 1])]]) if at else 0
        ends.append(min(end, most))
    return ends


def _last_of_each(roles: list[str]) -> dict[str, int]:
    return {role: index for index, role in enumerate(roles)}


def _words_after(message: int, roles: list[str], fill: Fill) -> str:
    """What the template writes after a message that nothing follows; "" where it does not end with that message."""
    pieces = _PLACEHOLDERS.split(fill(roles[: message + 1], False) or "")
    return pieces[-1] if len(pieces) > 1 and pieces[-2] == str(message) else ""


def _unchanged(text: str | None, pieces: list[str], words: list[_Words], starts: list[int]) -> int:
    """How many ids of the prompt this text begins with too."""
    others = pieces if text is None else _PLACEHOLDERS.split(text)
    for index, (own, other) in enumerate(zip(pieces, others, strict=False)):
        if own != other:
            return starts[index] if index % 2 else words[index // 2].common(other)
    return starts[len(others)] if len(others) < len(pieces) else words[-1].at + len(words[-1].ids)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many numbers both begin with."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
