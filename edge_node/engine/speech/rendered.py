"""A prompt as a speech lays it out. Does not know who laid it out, nor what the ids say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rendered:
    """Prompt ids; `ends[i]` is how many of them there are when item i has been said.

    ends never fall, and `ids[:ends[i]]` begins every prompt whose items begin with the items up to i, unless the
    format leaves out in one of the two what it says in the other. An item that is not said again ends where the
    one before it does. A speech that cannot tell exactly gives a smaller number.
    """

    ids: list[int]
    ends: list[int]
