"""A gpt-oss checkpoint from its published format to a client: exported, served in harmony, spoken to by the SDK.

The weights are random, so what is said is noise; where it comes from and how it is framed is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from export.build import Order, export
from export.recipes import Recipe
from tests.e2e.clients import sdk
from tests.e2e.processes import Fleet, build_fleet
from tests.tools.gpt_oss_checkpoint import TINY, write_checkpoint

MODEL = "tiny-oss"
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One node with a tiny gpt-oss of 8-bit experts."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    checkpoint = write_checkpoint(folder / "checkpoint", TINY)
    export(Order(str(checkpoint), folder / MODEL, MODEL, Recipe.CPU_INT8, run=False))
    fleet = build_fleet(folder / MODEL, folder / "fleet", None, nodes=["eu"])
    try:
        yield fleet.start()
    finally:
        fleet.close()


def ask(fleet: Fleet, **changes: Any) -> Any:
    client: Any = sdk(fleet)
    body = {"model": MODEL, "input": "What is the tide?", "max_output_tokens": 32}
    return client.responses.create(**(body | changes))


def test_a_gpt_oss_release_answers_the_sdk(gpt_oss: Fleet) -> None:
    response = ask(gpt_oss)
    assert response.status in {"completed", "incomplete"}
    assert 0 < response.usage.output_tokens <= 32
    assert {item.type for item in response.output} <= {"message", "reasoning", "function_call"}


def test_what_the_harmony_prompt_holds_shows_in_its_length(gpt_oss: Fleet) -> None:
    plain = ask(gpt_oss).usage.input_tokens
    instructed = ask(gpt_oss, instructions="Answer like a sailor.").usage.input_tokens
    tooled = ask(gpt_oss, tools=[TOOL]).usage.input_tokens
    assert plain < instructed < tooled


def test_streamed_and_whole_the_same_seed_says_the_same(gpt_oss: Fleet) -> None:
    client: Any = sdk(gpt_oss)
    body = {"model": MODEL, "input": "Again, please.", "max_output_tokens": 32, "temperature": 0}
    whole = client.responses.create(**body)
    with client.responses.create(**body, stream=True) as stream:
        events = list(stream)
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
