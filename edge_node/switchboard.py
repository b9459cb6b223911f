"""Which router's link each stream belongs to, and under which epoch.

Fences by epoch: a stream moves to the link that asks with a higher one, and what still comes for the lower
one is dropped. Knows links only by number; sends nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType, TypeAlias

from core.frames import Cancel, Done, Failed, Generate, Progress, Row, Started, Tokens
from edge_node.runtime.pipe import Outputs

LinkId = NewType("LinkId", int)
StreamFrame: TypeAlias = Tokens | Started | Progress | Done | Failed


@dataclass(frozen=True, slots=True)
class _Place:
    link: LinkId
    epoch: int


class Switchboard:
    """Invariant: a stream is in `_places` from its Generate until its Done or Failed, or until its link is lost."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._places)

    def admit(self, link: LinkId, request: Generate) -> bool:
        """Whether to hand `request` to the engine, which then ends an older epoch of the same stream itself."""
        place = self._places.get(request.stream)
        if place is not None and place.epoch >= request.epoch:
            self.dropped += 1
            return False
        self._places[request.stream] = _Place(link, request.epoch)
        return True

    def contest(self, link: LinkId, request: Generate) -> dict[LinkId, list[StreamFrame]]:
        """If two links ask for one stream: what to tell the one that loses it, before `admit`.

        Its router has not noticed that another one goes on with the response, and would wait here for ever.
        """
        place = self._places.get(request.stream)
        if place is None or place.link == link:
            return {}
        loser, epoch = (place.link, place.epoch) if place.epoch < request.epoch else (link, request.epoch)
        sentence = "Another router goes on with this response; resume it there."
        return {loser: [Failed(request.stream, epoch, "response_moved", True, sentence)]}

    def cancel(self, link: LinkId, cancel: Cancel) -> list[Cancel]:
        """What to tell the engine; a stream is cancelled only by its own link and epoch. Its Done is still routed."""
        if self._places.get(cancel.stream) == _Place(link, cancel.epoch):
            return [cancel]
        self.dropped += 1
        return []

    def drop_link(self, link: LinkId) -> list[Cancel]:
        """The link is lost: forget its streams; what to tell the engine."""
        lost = [(stream, place.epoch) for stream, place in self._places.items() if place.link == link]
        for stream, _ in lost:
            del self._places[stream]
        return [Cancel(stream, epoch) for stream, epoch in lost]

    def route(self, outputs: Outputs) -> dict[LinkId, list[StreamFrame]]:
        """One engine step's frames per link, in order, all rows of a link in one Tokens frame."""
        routed: dict[LinkId, list[StreamFrame]] = {}
        for early in outputs.before:
            if (link := self._link_of(early)) is not None:
                routed.setdefault(link, []).append(early)
        for link, rows in self._rows_by_link(outputs.rows).items():
            routed.setdefault(link, []).append(Tokens(rows))
        for end in outputs.after:
            if (link := self._link_of(end)) is not None:
                routed.setdefault(link, []).append(end)
                del self._places[end.stream]
        return routed

    def fail_all(self, code: str, message: str) -> dict[LinkId, list[StreamFrame]]:
        """End every stream retryably; the frames that say so, per link."""
        failed: dict[LinkId, list[StreamFrame]] = {}
        for stream, place in self._places.items():
            failed.setdefault(place.link, []).append(Failed(stream, place.epoch, code, True, message))
        self._places.clear()
        return failed

    def _rows_by_link(self, rows: list[Row]) -> dict[LinkId, list[Row]]:
        by_link: dict[LinkId, list[Row]] = {}
        for row in rows:
            if (link := self._link_of(row)) is not None:
                by_link.setdefault(link, []).append(row)
        return by_link

    def _link_of(self, frame: Row | Started | Progress | Done | Failed) -> LinkId | None:
        place = self._places.get(frame.stream)
        if place is None or place.epoch != frame.epoch:
            self.dropped += 1
            return None
        return place.link
