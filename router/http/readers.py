"""Readers of a response that are not a stream: they wait for its end."""

from __future__ import annotations

import asyncio
from typing import Any

from core.errors import DeadlineExceeded, EdgechatError
from core.stream import Event, Failure
from router.api.errors import from_failure
from router.fleet import Node
from router.journal import StoredResponse


class Whole:
    """Waits for the end and gives the whole; node: the name of the one that began the answer."""

    def __init__(self) -> None:
        self.node = ""
        self._last: Event = {}
        self._end: asyncio.Future[StoredResponse | Failure] = asyncio.get_running_loop().create_future()

    def on_events(self, events: list[Event]) -> None:
        if events:
            self._last = events[-1]

    def on_serving(self, node: Node) -> None:
        self.node = self.node or node.hello.name

    def on_reading(self, computed: int, total: int) -> None:
        """Nothing to show: this client asked for the end only."""

    def on_end(self, response: StoredResponse) -> None:
        if not self._end.done():
            self._end.set_result(response)

    def on_refused(self, failure: Failure) -> None:
        if not self._end.done():
            self._end.set_result(failure)

    async def ended(self) -> StoredResponse:
        """The finished response, however it ended; raises EdgechatError if its end does not come here."""
        response = await asyncio.shield(self._end)
        if isinstance(response, Failure):
            raise from_failure(response)
        return response

    async def stored(self) -> StoredResponse:
        """The finished response; raises EdgechatError if it failed or was refused."""
        response = await self.ended()
        if response.end.status == "failed" and response.end.error is not None:
            raise from_failure(response.end.error)
        return response

    async def response(self) -> dict[str, Any]:
        """The finished response object; raises EdgechatError if it failed."""
        await self.stored()
        response: dict[str, Any] = self._last["response"]
        return response

    async def response_in_time(self) -> dict[str, Any]:
        """As `response`, except that what was said before a deadline came is given, failed as the response is."""
        try:
            return await self.response()
        except EdgechatError as error:
            response: dict[str, Any] = self._last.get("response", {})
            if error.code == DeadlineExceeded.code and response.get("output"):
                return response
            raise
