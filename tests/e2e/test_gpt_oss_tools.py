"""Twenty turns with a gpt-oss that calls functions: real node, real router, the SDK, the genuine vocabulary.

Its weights are noise, so a test-only sampler gives the frames (tests/tools/harmony_script); everything else is as
it is for the real model: what is asked, cut into tokens, computed, heard, stored, told again and found again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core.conversation import Item, prefix_keys
from core.stream import output_items
from edge_node.engine.speech import HarmonySpeech, Rendered, Setting, open_speech
from edge_node.engine.step import BLOCK_TOKENS
from edge_node.release.model_store import open_release
from export.recipes import Recipe
from router.api.call import rendered
from router.journal import StoredResponse
from tests.e2e.clients import answer, check_log, raw_socket, sdk
from tests.e2e.processes import Fleet, Router, link_secret
from tests.e2e.scripted import MODEL, ScriptedNode, write_release
from tests.e2e.waiting import eventually
from tests.tools.gpt_oss_checkpoint import FULL
from tests.tools.harmony_script import Noise, Script, seed_of

PREFIX_S = 120.0
INSTRUCTIONS = "You are a harbour master who looks things up before he speaks."
TOOLS = [
    {
        "type": "function",
        "name": "weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "A town."}},
            "required": ["place"],
        },
    },
    {
        "type": "function",
        "name": "tide",
        "description": "High and low water.",
        "parameters": {
            "type": "object",
            "properties": {"harbour": {"type": "string"}, "days": {"type": "integer", "default": 1}},
        },
    },
]
SHAPES = {
    "call": ["reasoning", "function_call weather"],
    "call after preamble": ["reasoning", "message commentary", "function_call tide"],
    "answer": ["reasoning", "message final_answer"],
    "bare answer": ["message final_answer"],
}
#: What one turn of the user leads to, in turn.
ROUNDS = [
    ["call", "answer"],
    ["answer"],
    ["call", "call after preamble", "answer"],
    ["bare answer"],
    ["call", "answer"],
]


def scripted_fleet(release: Path, folder: Path) -> Fleet:
    folder.mkdir()
    node = ScriptedNode("eu", release, folder, settings={"EDGE__ENGINE__CONTEXT_TOKENS": "4096"})
    router = Router(folder, nodes=[node], settings={"ROUTER__DEFAULTS__MAX_OUTPUT_TOKENS": "512"})
    return Fleet(None, {"eu": node}, router)


@dataclass
class Talk:
    """One conversation over `previous_response_id`, held against what the router stores and the format says."""

    fleet: Fleet
    release: Path
    store: Path
    secret: bytes
    last_id: str | None = None
    asked: int = 0
    cached_tokens: list[int] = field(default_factory=list)
    history: list[Item] = field(default_factory=list)

    @cached_property
    def speech(self) -> HarmonySpeech:
        release = open_release(self.release)
        speech = open_speech(release.manifest, release.read_text)
        assert isinstance(speech, HarmonySpeech)
        return speech

    @cached_property
    def node(self) -> ScriptedNode:
        node = self.fleet.node("eu")
        assert isinstance(node, ScriptedNode)
        return node

    @cached_property
    def client(self) -> Any:
        return sdk(self.fleet)

    # -- asking -----------------------------------------------------------------------------

    def ask(self, said: list[dict[str, Any]], kind: str, *, effort: str = "high", socket: bool = False) -> Any:
        """One response of this kind, checked in every way; returns its JSON."""
        self.asked += 1
        seed = seed_of(kind, self.asked)
        body: dict[str, Any] = {"model": MODEL, "input": said, "tools": TOOLS, "instructions": INSTRUCTIONS}
        body |= {"reasoning": {"effort": effort}, "previous_response_id": self.last_id}
        send = self._over_socket if socket else self._over_http
        events = send(body, seed)
        check_log(events)
        if lost(events):
            # A busy machine held up a step for so long that the only node was suspected. Had the engine died, its
            # prefixes would be gone, and `cached_tokens` would show it.
            eventually(self.fleet.all_ready, PREFIX_S, "the node is trusted again")
            events = send(body, seed)
            check_log(events)
        response = events[-1]["response"]
        assert response["status"] == "completed", response
        check_items(response["output"], events, kind)
        self._check_ids(response, seed, effort)
        self.last_id = response["id"]
        return response

    def _over_http(self, body: dict[str, Any], seed: int) -> list[dict[str, Any]]:
        client: Any = sdk(self.fleet)
        with client.with_options(timeout=300).responses.create(
            **body, stream=True, extra_body={"seed": seed}
        ) as stream:
            return [event.to_dict() for event in stream]

    def _over_socket(self, body: dict[str, Any], seed: int) -> list[dict[str, Any]]:
        with raw_socket(self.fleet) as socket:
            return answer(socket, **body, seed=seed)

    # -- what was computed, stored and told again -------------------------------------------

    def _check_ids(self, response: dict[str, Any], seed: int, effort: str) -> None:
        stored = self._stored(response["id"])
        line = Script(self.speech).line(seed)
        assert [token for token, given in zip(stored.ids, line, strict=True) if token == given] == [
            given for given in line if not isinstance(given, Noise)
        ]
        prompt = self._laid_out(rendered(stored.record.request, self.history), effort)
        usage = response["usage"]
        assert (usage["input_tokens"], usage["output_tokens"]) == (len(prompt.ids), len(line))
        thought = next((item for item in response["output"] if item["type"] == "reasoning"), None)
        assert (usage["output_tokens_details"]["reasoning_tokens"] > 0) == (thought is not None)
        self.cached_tokens.append(usage["input_tokens_details"]["cached_tokens"])
        before = len(self.history) + len(stored.record.request.input)
        self.history += [*stored.record.request.input, *self._said(stored)]
        self._check_told_again(stored, before, effort)

    def _check_told_again(self, stored: StoredResponse, before: int, effort: str) -> None:
        """The next prompt has the generated ids as they are, headers included, or leaves out old reasoning."""
        special = self.speech.special
        items = rendered(stored.record.request, [])[:1] + self.history
        again = self._laid_out([*items, Item("message", "user", "")], effort)
        over = items[-1].kind == "message"
        borders = again.ends[before : before + len(self.history) - before + 1]
        messages = messages_of(stored.ids, self.speech)
        for item, message, (start, end) in zip(self.history[before:], messages, pairwise(borders), strict=True):
            dropped = over and item.kind == "reasoning"
            terminator = special["<|call|>" if item.kind == "function_call" else "<|end|>"]
            assert again.ids[start:end] == ([] if dropped else [*message, terminator])

    def wait_until_read_again(self) -> int:
        """Until the idle node has the beginning of the next prompt; returns how much of it in whole blocks."""
        stored = self._stored(self.last_id or "")
        items = [*rendered(stored.record.request, [])[:1], *self.history]
        effort = (stored.record.request.reasoning or {})["effort"]
        end = self._laid_out([*items, Item("message", "user", "")], effort).ends[len(items) - 1]
        whole = end // BLOCK_TOKENS * BLOCK_TOKENS
        salt = hmac.new(self.secret, stored.record.tenant.encode(), hashlib.sha256).hexdigest()
        key = prefix_keys(items, stored.record.release, salt)[-1]
        eventually(lambda: self.node.resident_tokens(key) == whole, PREFIX_S, f"{whole} tokens are resident")
        return whole

    def _laid_out(self, items: list[Item], effort: str) -> Rendered:
        release = open_release(self.release).manifest.release
        return self.speech.lay_out(items, release, Setting(TOOLS, None, effort))

    def _said(self, stored: StoredResponse) -> list[Item]:
        return output_items(stored.record.id, stored.record.release, stored.ids, stored.deltas)

    def _stored(self, response_id: str) -> StoredResponse:
        connection = sqlite3.connect(f"file:{self.store}?mode=ro", uri=True)
        try:
            (payload,) = connection.execute("SELECT payload FROM responses WHERE id = ?", (response_id,)).fetchone()
        finally:
            connection.close()
        return msgspec.msgpack.decode(payload, type=StoredResponse)


def lost(events: list[dict[str, Any]]) -> bool:
    """Whether the client was told to send its request again because the router had left the node."""
    error = events[-1]["response"]["error"] or {}
    return error.get("edgechat_code") == "node_lost" and error["retryable"] is True


def messages_of(ids: list[int], speech: HarmonySpeech) -> list[list[int]]:
    """The messages of an answer, each from its `<|start|>` up to its terminator."""
    terminators = {speech.special[text] for text in ("<|end|>", "<|call|>", "<|return|>")}
    messages = [[speech.special["<|start|>"], *speech.encode("assistant")]]
    for token in ids:
        if token in terminators:
            messages.append([])
        else:
            messages[-1].append(token)
    return messages[:-1]


def check_items(output: list[dict[str, Any]], events: list[dict[str, Any]], kind: str) -> None:
    """What the client got is what the script says: items, names, arguments, and deltas that add up to them."""
    shapes = [" ".join(filter(None, [item["type"], item.get("phase") or item.get("name")])) for item in output]
    assert shapes == SHAPES[kind]
    for index, item in enumerate(output):
        said = [event for event in events if event.get("output_index") == index and event["type"].endswith(".delta")]
        text = "".join(event["delta"] for event in said)
        match item["type"]:
            case "function_call":
                assert {event["type"] for event in said} == {"response.function_call_arguments.delta"}
                assert text == item["arguments"]
                check_arguments(item["name"], json.loads(text))
            case "message" | "reasoning":
                assert text == item["content"][0]["text"] != ""


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    match name:
        case "weather":
            assert list(arguments) == ["place"] and arguments["place"]
        case "tide":
            assert list(arguments) == ["harbour", "days"] and arguments["harbour"] and arguments["days"] == 3
        case _:
            raise AssertionError(name)


def hold(talk: Talk, turns: int) -> None:
    """Turns with calls and without, one of them over a WebSocket; every response finds what came before it."""
    begun: list[int] = []
    for turn in range(turns):
        said = [{"role": "user", "content": f"Turn {turn}: may the ship leave the harbour today, and if so, when?"}]
        for kind in ROUNDS[turn % len(ROUNDS)]:
            known = talk.wait_until_read_again() if talk.last_id else 0
            response = talk.ask(said, kind, socket=turn == 1)
            # Where old reasoning was dropped, too; all of it but the last, unfinished block.
            assert talk.cached_tokens[-1] >= known, (turn, kind, talk.cached_tokens)
            begun += [talk.cached_tokens[-1]] if said[0].get("role") else []
            said = [
                {"type": "function_call_output", "call_id": item["call_id"], "output": '{"wind":"west","force":4}'}
                for item in response["output"]
                if item["type"] == "function_call"
            ]
    assert begun == sorted(begun) and begun[0] == 0 < begun[1] < begun[-1]
    # Another effort is another system message: what is known is of no use, and nothing is claimed.
    talk.wait_until_read_again()
    talk.ask([{"role": "user", "content": "Quick!"}], "answer", effort="low")
    assert talk.cached_tokens[-1] == 0


@pytest.fixture(scope="module")
def tiny_talk(tiny_gpt_oss: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    """Four small layers under the genuine vocabulary."""
    yield from start(tiny_gpt_oss, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def full_talk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    """Two layers of gpt-oss-20b's own widths."""
    folder = tmp_path_factory.mktemp("full")
    yield from start(write_release(folder, replace(FULL, layers=2), Recipe.CPU_INT4), folder)


def start(release: Path, folder: Path) -> Iterator[Talk]:
    fleet = scripted_fleet(release, folder / "fleet")
    try:
        fleet.start()
        secret = link_secret(folder / "fleet").read_bytes().strip()
        yield Talk(fleet, release, folder / "fleet" / f"{fleet.router.name}.sqlite", secret)
    finally:
        fleet.close()


def test_a_conversation_with_functions(tiny_talk: Talk) -> None:
    hold(tiny_talk, 5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_turns_with_functions_at_full_width(full_talk: Talk) -> None:
    hold(full_talk, 20)
