"""From a checked call to a running response: model, history, node, record.

The one place where a response's id and seed are made. Does not know the dialects.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from typing import TypeAlias

import msgspec

from core.conversation import MAX_ITEMS, Item, prefix_keys
from core.errors import NoNodeAvailable, PreviousResponseNotFound, RequestError, UnknownModel
from core.stream import Request, RequestRecord, output_items
from router.api.call import Call, rendered
from router.errors import Draining
from router.fleet import Fleet
from router.journal import StoredResponse
from router.policy import choose
from router.session import Instant
from router.sessions import Reader, Running, Sessions
from router.terms import priority

MAX_TURNS = 1000
# More than any model's context, less than what a link carries in one frame.
MAX_HISTORY_CHARACTERS = 8 * 1024 * 1024


Recall: TypeAlias = Callable[[str, str], Awaitable[StoredResponse | None]]
"""(tenant, response id) -> that finished response, wherever it is kept."""


class Dispatcher:
    """salt_of: as for `Sessions`."""

    def __init__(
        self,
        name: str,
        fleet: Fleet,
        sessions: Sessions,
        recall: Recall,
        now: Callable[[], Instant],
        salt_of: Callable[[str], str],
    ) -> None:
        self.draining = False
        self._name = name
        self._fleet = fleet
        self._sessions = sessions
        self._recall = recall
        self._now = now
        self._salt_of = salt_of

    async def begin(
        self, tenant: str, call: Call, reader: Reader, kept: Mapping[str, StoredResponse] | None = None
    ) -> Running:
        """Promise a response; from here on the reader is told everything, the end included.

        kept: finished responses that only this client's connection remembers.
        Raises UnknownModel, PreviousResponseNotFound, NoNodeAvailable, RequestError, Draining.
        """
        arrived_at_s = self._now().mono_s if call.arrived_at_s is None else call.arrived_at_s
        if self.draining:
            raise Draining
        _check_bounds(call.request)
        model = call.request.model
        if not self._fleet.knows(model):
            known = self._fleet.models()
            raise UnknownModel(model, known) if known else NoNodeAvailable(model)
        history = call.history or await self._history(tenant, call.request.previous_response_id, kept or {})
        items = rendered(call.request, history)
        if len(items) > MAX_ITEMS:
            raise RequestError(
                f"The conversation has {len(items)} items, at most {MAX_ITEMS} are taken.", param="input"
            )
        # From the choice to its dispatch nothing is awaited: what was chosen is still true.
        salt = self._salt_of(tenant)
        keys_under = cache(lambda release: prefix_keys(items, release, salt))
        choice = choose(
            self._fleet.ready(self._now().mono_s),
            model,
            prefix_keys=keys_under,
            yields=priority(call.request) < 0,
        )
        if choice is None:
            raise NoNodeAvailable(model)
        record = self._record(tenant, call, choice.release)
        if not call.generate:
            return self._sessions.warm_up(record, reader)
        return self._sessions.start(record, items, choice, reader, arrived_at_s, keys_under(choice.release))

    def _record(self, tenant: str, call: Call, release: str) -> RequestRecord:
        return RequestRecord(
            id=f"{call.prefix}_{self._name}_{secrets.token_hex(12)}",
            tenant=tenant,
            created_at=self._now().unix_s,
            seed=secrets.randbits(63) if call.seed is None else call.seed,
            release=release,
            request=call.request,
        )

    async def _history(self, tenant: str, response_id: str | None, kept: Mapping[str, StoredResponse]) -> list[Item]:
        """Everything said up to and including `response_id`; instructions are not part of it."""
        asked = response_id
        turns: list[list[Item]] = []
        characters = 0
        while response_id is not None:
            past = kept.get(response_id) or await self._recall(tenant, response_id)
            if past is None:
                # The one that the client knows, also where an earlier turn of its conversation is gone.
                raise PreviousResponseNotFound(asked or response_id)
            if len(turns) == MAX_TURNS:
                sentence = f"The conversation has more than {MAX_TURNS} turns; start a new one with a summary."
                raise RequestError(sentence, param="previous_response_id")
            said = output_items(past.record.id, past.record.release, past.ids, past.deltas)
            turns.append([*past.record.request.input, *said])
            characters += sum(len(item.text) for item in turns[-1])
            if characters > MAX_HISTORY_CHARACTERS:
                sentence = f"The conversation has more than {MAX_HISTORY_CHARACTERS} characters; start a new one."
                raise RequestError(sentence, param="previous_response_id")
            response_id = past.record.request.previous_response_id
        return [item for turn in reversed(turns) for item in turn]


def _check_bounds(request: Request) -> None:
    """JSON's numbers have no end and it nests without one, link and store have bounds; raises RequestError."""
    try:
        msgspec.msgpack.encode(request)
    except OverflowError as error:
        raise RequestError("A number in the request has more than 64 bits; send a smaller one.") from error
    except RecursionError as error:
        raise RequestError("The request is nested too deeply; send it flatter.") from error
