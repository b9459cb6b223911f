"""A gpt-oss loses its node while it thinks, and within a function's arguments.

Its weights are noise, so a script gives the frames (tests/tools/harmony_script) and takes its time over each id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.frames import Arguments, Delta, ItemStart, Text
from tests.e2e.disasters import WiredFleet, WiredNode, wired_fleet
from tests.e2e.hearing import Heard, ids_at_the_move, kept, listening, over_websocket
from tests.e2e.scripted import MODEL, ScriptedNode
from tests.tools.harmony_script import seed_of

TOOLS = [
    {
        "type": "function",
        "name": "weather",
        "description": "The weather at a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    }
]
CALL: dict[str, Any] = {
    "model": MODEL,
    "input": "May the ship leave the harbour?",
    "tools": TOOLS,
    "reasoning": {"effort": "low"},
    # The longest of its kind.
    "seed": seed_of("call", 4),
}


class WiredScriptedNode(ScriptedNode, WiredNode):
    """Follows the script, on a wire."""


@pytest.fixture(scope="module")
def fleet_of_two(tiny_gpt_oss: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WiredFleet]:
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SCRIPT_PACE_S", "0.02")
        # This variant does not claim that a prompt which is read in other pieces gives the same logits to the last bit.
        edge = {"EDGE__ENGINE__KV_CACHE_BYTES": "0"}
        fleet = wired_fleet(tiny_gpt_oss, folder, ("eu", "us"), edge=edge, kind=WiredScriptedNode)
        try:
            yield fleet.start()
        finally:
            fleet.close()


@pytest.fixture(scope="module")
def undisturbed(fleet_of_two: WiredFleet) -> Heard:
    return over_websocket(fleet_of_two, **CALL)


def check(fleet: WiredFleet, heard: Heard, undisturbed: Heard) -> None:
    """The same ids, thoughts, names and arguments."""
    assert len(heard.nodes) == 2
    assert heard.same() == undisturbed.same()
    assert kept(fleet.router, heard.response_id).ids == kept(fleet.router, undisturbed.response_id).ids
    thought, call = heard.events[-1]["response"]["output"]
    other_thought, other_call = undisturbed.events[-1]["response"]["output"]
    assert thought["content"] == other_thought["content"]
    assert (call["name"], call["arguments"]) == ("weather", other_call["arguments"])
    assert json.loads(call["arguments"])["place"]
    for kind in ("reasoning_text", "function_call_arguments"):
        deltas = [event["delta"] for event in heard.events if event["type"] == f"response.{kind}.delta"]
        assert deltas == [
            event["delta"] for event in undisturbed.events if event["type"] == f"response.{kind}.delta"
        ], "other pieces"


@pytest.mark.parametrize("part", ["reasoning_text", "function_call_arguments"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_node_lost_inside_a_part_of_an_answer_is_replaced(
    fleet_of_two: WiredFleet, undisturbed: Heard, part: str, pieces: int
) -> None:
    fleet_of_two.mend()
    with listening(fleet_of_two, **CALL) as listener:
        for _ in range(pieces):
            listener.until(lambda event: event["type"] == f"response.{part}.delta")
        fleet_of_two.node(listener.nodes[-1]).wire.reset()
        heard = listener.to_the_end()
    check(fleet_of_two, heard, undisturbed)
    said = kept(fleet_of_two.router, heard.response_id).deltas
    moved_after = ids_at_the_move(fleet_of_two, heard.response_id)
    kind = Text if part == "reasoning_text" else Arguments
    assert pieces <= pieces_of(kind, said[:moved_after]) < pieces_of(kind, said)


def pieces_of(kind: type[Text] | type[Arguments], said: list[list[Delta]]) -> int:
    """How many pieces of this kind the ids have brought."""
    assert any(isinstance(delta, ItemStart) for deltas in said for delta in deltas)
    return sum(isinstance(delta, kind) for deltas in said for delta in deltas)
