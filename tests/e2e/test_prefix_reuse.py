"""What was read once is not read again: through client, router, link, node and engine process."""

from __future__ import annotations

from typing import Any

from tests.e2e.clients import MODEL, sdk
from tests.e2e.conftest import MakeFleet
from tests.e2e.processes import Fleet
from tests.e2e.waiting import eventually

BLOCK_TOKENS = 64
STORY = "The river rises in the hills behind the town and turns twice before it meets the sea. " * 30


def chains_of(fleet: Fleet) -> int:
    (row,) = fleet.router.fleet()
    return int(row["chains"])


def ask(fleet: Fleet, text: str, after: str | None = None) -> Any:
    limits = {"temperature": 0, "max_output_tokens": 16}
    return sdk(fleet).responses.create(model=MODEL, input=text, previous_response_id=after, **limits)  # type: ignore[call-overload]


def test_the_next_turn_reads_only_what_is_new_until_the_engine_dies(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(nodes=["eu"], consul=False)
    first = ask(fleet, STORY)
    whole_blocks = first.usage.input_tokens // BLOCK_TOKENS * BLOCK_TOKENS
    assert whole_blocks > 4 * BLOCK_TOKENS
    assert first.usage.input_tokens_details.cached_tokens == 0
    eventually(lambda: chains_of(fleet) > 0, what="the router knows what the node holds")

    second = ask(fleet, "Go on.", first.id)
    cached = second.usage.input_tokens_details.cached_tokens
    assert whole_blocks <= cached < second.usage.input_tokens
    assert cached % BLOCK_TOKENS == 0

    fleet.nodes["eu"].kill_engine()
    eventually(lambda: chains_of(fleet) == 0, what="the router knows that all is gone")
    eventually(fleet.all_ready, what="a new engine")
    again = ask(fleet, "Go on.", first.id)
    assert again.usage.input_tokens_details.cached_tokens == 0
    assert again.output_text == second.output_text
