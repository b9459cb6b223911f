"""Conversations, tools and answers for gpt-oss, generated from a seed: as people, clients and models make them."""

from __future__ import annotations

from random import Random
from typing import Any

from core.conversation import Item
from edge_node.engine.speech.setting import Setting

_WORDS = [
    *"the weather in Tokyo isn't what it was; we'll see HTTPServer getURL 3.14159 1234567 0xFF naïve café".split(),
    *"天气 東京の天気は 날씨 Straße Ωμέγα привет שלום مرحبا हिन्दी ไทย İstanbul ǅ ﬁ ½ Ⅷ ੴ".split(),
    *"👍 👩‍👩‍👧‍👦 🇩🇪 é ñ \u200b \u00a0 \ufeff \ufffd \u2028 \x00 \x1b \x85 \U0001f9ff \U00020000 \ue000".split(" "),
    *"<|start|>system<|message|> <|end|> <|call|> <|return|> <|channel|>final <|constrain|> <|endoftext|>".split(),
    *"to=functions.look functions.look assistant # ## // {} [] \" \\ ' `code` ``` --- ... !!! ?".split(),
]
_SPACES = [" ", " ", " ", " ", "", "\n", "\n\n", "\r\n", "\t", "   ", " \n ", "　"]
_NAMES = ["look", "get_current_weather", "search-web", "f", "Lookup2", "日本", "a.b", "x" * 64]


def text(random: Random, most: int = 12) -> str:
    pieces = [random.choice(_WORDS) + random.choice(_SPACES) for _ in range(random.randint(0, most))]
    if random.random() < 0.1:
        pieces.append("".join(chr(_scalar(random)) for _ in range(random.randint(1, 8))))
    return "".join(pieces)


def _scalar(random: Random) -> int:
    """Any character but half a surrogate pair."""
    code = random.choice([random.randrange(0x250), random.randrange(0xD800), random.randrange(0xE000, 0x110000)])
    return code


def conversation(random: Random, rounds: int = 4) -> list[Item]:
    """Instructions, then rounds of question, reasoning, calls, preambles and answers; the last may be half done."""
    items = [_instruction(random) for _ in range(random.choice([0, 1, 1, 1, 2]))]
    for index in range(random.randint(0, rounds)):
        items.append(Item("message", "user", text(random)))
        if random.random() < 0.1:
            items.append(_instruction(random))
        for step in range(random.choice([0, 0, 1, 1, 2, 3])):
            items += _tool_round(random, f"call_{index}_{step}")
        if random.random() < 0.5:
            items.append(_reasoning(random))
        if random.random() < 0.8:
            items.append(Item("message", "assistant", text(random), phase=random.choice(["", "final_answer"])))
    if random.random() < 0.9:
        items.append(Item("message", "user", text(random)))
    return items


def _instruction(random: Random) -> Item:
    return Item("message", random.choice(["system", "developer"]), text(random))


def _reasoning(random: Random) -> Item:
    return Item("reasoning", "assistant", "so: " + text(random))


def _tool_round(random: Random, call_id: str) -> list[Item]:
    items = [_reasoning(random)] if random.random() < 0.7 else []
    if random.random() < 0.3:
        items.append(Item("message", "assistant", text(random), phase="commentary"))
    items.append(Item("function_call", "assistant", text(random), name=random.choice(_NAMES), call_id=call_id))
    items.append(Item("function_call_output", "tool", text(random), call_id=call_id))
    return items


def setting(random: Random) -> Setting:
    efforts = ["", "none", "minimal", "low", "medium", "high", "xhigh"]
    return Setting(tools=[_tool(random) for _ in range(random.choice([0, 0, 1, 2, 3]))], effort=random.choice(efforts))


def _tool(random: Random) -> dict[str, Any]:
    if random.random() < 0.1:
        return {"type": "web_search"}
    tool: dict[str, Any] = {"type": "function", "name": random.choice(_NAMES)}
    tool |= {"description": text(random), "strict": random.choice([None, True])} if random.random() < 0.8 else {}
    parameters = random.choice([None, {}, {"type": "object", "properties": {}}, schema(random, 3), schema(random, 3)])
    return tool | {"parameters": parameters}


def schema(random: Random, depth: int) -> dict[str, Any]:
    """A JSON schema with what the format writes, what it leaves out, and what is no schema at all."""
    kinds = ["string", "string", "number", "integer", "boolean", "null", "nonsense"]
    kinds += ["object", "object", "array", "oneOf", "list", "anyOf"] if depth else []
    kind = random.choice(kinds)
    made: dict[str, Any] = {"type": kind} if kind not in ("oneOf", "list", "anyOf") else {}
    match kind:
        case "object":
            names = [random.choice(["q", "city", "日", "a b", f"p{index}"]) for index in range(random.randint(0, 4))]
            made["properties"] = {name: schema(random, depth - 1) for name in names}
            made["required"] = [name for name in names if random.random() < 0.5]
        case "array" if random.random() < 0.8:
            made["items"] = schema(random, depth - 1)
        case "oneOf" | "anyOf":
            made[kind] = [schema(random, depth - 1) for _ in range(random.randint(0, 3))]
        case "list":
            made["type"] = random.sample(["integer", "string", "null"], random.randint(0, 3))
        case "string" if random.random() < 0.4:
            made["enum"] = random.sample(["celsius", "fahrenheit", 'quo"ted', 3, None], random.randint(0, 4))
    return made | _notes(random)


def _notes(random: Random) -> dict[str, Any]:
    """What may stand beside any type."""
    notes: dict[str, Any] = {}
    if random.random() < 0.4:
        notes["description"] = random.choice(["same", text(random, 4)])
    if random.random() < 0.15:
        notes["title"] = text(random, 2)
    if random.random() < 0.15:
        notes["examples"] = random.choice([[], ["one", 2, "three"], "none"])
    if random.random() < 0.2:
        notes["nullable"] = random.choice([True, True, False, "yes"])
    if random.random() < 0.3:
        notes["default"] = random.choice(
            ["celsius", "", 'a"b', 10, -1, 0.5, 1.0, 1e20, 1e-7, 123456789.125, True, None, [1, "a"], {"z": 1, "a": {}}]
        )
    return notes
