"""What a session wants done: it decides, `router/sessions` carries out, in order. Nothing here does anything."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import msgspec

from core.frames import Cancel, Generate
from core.stream import Event, Failure
from router.journal import Entry, StoredResponse


class SendNode(msgspec.Struct, frozen=True):
    """Send a frame over the link of `node`."""

    node: str
    frame: Generate | Cancel


class Place(NamedTuple):
    """A node that was chosen; variant: the recipe it would answer with."""

    node: str
    variant: str
    context_tokens: int


class NeedNode(msgspec.Struct, frozen=True):
    """Choose a node that serves `release`, none of `exclude`; answer with `assign`.

    variant: what the answer was begun with, preferred; "" = none yet. context_tokens: the least the node must hold.
    """

    release: str
    exclude: frozenset[str]
    variant: str = ""
    context_tokens: int = 0


class Write(msgspec.Struct, frozen=True):
    """Have `entry` written down; answer with `on_written`, in the order of the writes."""

    entry: Entry


class Deliver(msgspec.Struct, frozen=True):
    """Client events for every reader, in order."""

    events: list[Event]


class Serving(msgspec.Struct, frozen=True):
    """From now on `node` answers (the `edgechat:node` extension)."""

    node: str


class Reading(msgspec.Struct, frozen=True):
    """The node has read `computed` of `total` prompt tokens (the `edgechat:progress` extension)."""

    computed: int
    total: int


class Finished(msgspec.Struct, frozen=True):
    """The session is over, and so is the response."""

    response: StoredResponse


class Refused(msgspec.Struct, frozen=True):
    """The session is over without an end of the response: it was not promised, or goes on elsewhere or later."""

    failure: Failure


Effect: TypeAlias = SendNode | NeedNode | Write | Deliver | Serving | Reading | Finished | Refused
