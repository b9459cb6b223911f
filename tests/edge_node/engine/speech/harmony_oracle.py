"""openai-harmony as an oracle: the same conversation and the same stream of ids, in its terms.

The library has no vocabulary of its own and wants to download one; here it is rebuilt from the genuine
tokenizer.json, and the library checks its hash. It takes no other vocabulary, so the tiny tokenizer has no oracle.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.conversation import Item
from edge_node.engine.speech.detokeniser import printable_bytes
from edge_node.engine.speech.setting import Setting

if TYPE_CHECKING:
    from openai_harmony import HarmonyEncoding, Message

_BASE = "TIKTOKEN_ENCODINGS_BASE"
_EFFORTS = {"none": "Low", "minimal": "Low", "low": "Low", "high": "High", "xhigh": "High"}


@dataclass(frozen=True)
class Heard:
    """One message, as the library's parser gives it."""

    role: str
    channel: str
    recipient: str
    text: str


class Oracle:
    """The library with the genuine vocabulary. It is imported late: collecting tests needs no oracle."""

    def __init__(self, encoding: HarmonyEncoding) -> None:
        self._encoding = encoding

    @classmethod
    def load(cls, tokenizer_json: Path, folder: Path) -> Oracle:
        """folder: where the rebuilt vocabulary may lie."""
        from openai_harmony import load_harmony_encoding

        _write_ranks(tokenizer_json, folder / "o200k_base.tiktoken")
        with _environment(_BASE, str(folder)):
            return cls(load_harmony_encoding("HarmonyGptOss"))

    def prompt(self, items: list[Item], setting: Setting, drop: bool) -> list[int]:
        """drop: leave the dropping of reasoning to the library."""
        from openai_harmony import Conversation, RenderConversationConfig, Role

        conversation = Conversation.from_messages(_messages(items, setting))
        config = RenderConversationConfig(auto_drop_analysis=drop)
        ids: list[int] = self._encoding.render_conversation_for_completion(conversation, Role.ASSISTANT, config)
        return ids

    def hear(self, ids: list[int]) -> list[Heard] | None:
        """The complete messages in an answer; None where the library raises."""
        from openai_harmony import HarmonyError, Role, StreamableParser

        parser = StreamableParser(self._encoding, Role.ASSISTANT)
        try:
            for token in ids:
                parser.process(token)
        except HarmonyError:
            return None
        return [
            Heard(message.author.role.value, message.channel or "", message.recipient or "", _text_of(message))
            for message in parser.messages
        ]


def _text_of(message: Message) -> str:
    from openai_harmony import TextContent

    return "".join(content.text for content in message.content if isinstance(content, TextContent))


def _messages(items: list[Item], setting: Setting) -> list[Message]:
    from openai_harmony import Message, ReasoningEffort, Role, SystemContent

    effort = getattr(ReasoningEffort, _EFFORTS.get(setting.effort, "Medium").upper())
    system = SystemContent.new().with_reasoning_effort(effort)
    opening = next((at for at, item in enumerate(items) if item.role not in ("system", "developer")), len(items))
    messages = [Message.from_role_and_content(Role.SYSTEM, system)]
    if opening or any(tool["type"] == "function" for tool in setting.tools):
        messages.append(_developer([item.text for item in items[:opening]], setting.tools))
    names = {item.call_id: item.name for item in items if item.kind == "function_call"}
    return messages + [_message(item, names) for item in items[opening:]]


def _developer(instructions: list[str], tools: list[dict[str, Any]]) -> Message:
    from openai_harmony import DeveloperContent, Message, Role, ToolDescription

    content = DeveloperContent.new()
    if instructions:
        content = content.with_instructions("\n\n".join(instructions))
    functions = [
        ToolDescription.new(tool["name"], tool.get("description") or "", tool.get("parameters"))
        for tool in tools
        if tool["type"] == "function"
    ]
    content = content.with_function_tools(functions) if functions else content
    return Message.from_role_and_content(Role.DEVELOPER, content)


def _message(item: Item, names: dict[str, str]) -> Message:
    from openai_harmony import Author, Message, Role

    if item.role in ("system", "developer"):
        return _developer([item.text], [])
    if item.kind == "function_call_output":
        author = Author.new(Role.TOOL, f"functions.{names[item.call_id]}")
        output = Message.from_author_and_content(author, item.text)
        return output.with_channel("commentary").with_recipient("assistant")
    said = Message.from_role_and_content(Role(item.role), item.text)
    if item.kind == "reasoning":
        return said.with_channel("analysis")
    if item.kind == "function_call":
        call = said.with_channel("commentary").with_recipient(f"functions.{item.name}")
        return call.with_content_type("<|constrain|>json")
    if item.role == "assistant":
        return said.with_channel("commentary" if item.phase == "commentary" else "final")
    return said


def _write_ranks(tokenizer_json: Path, target: Path) -> None:
    byte_of = printable_bytes()
    vocabulary: dict[str, int] = json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]["vocab"]
    ranks = sorted((rank, bytes(byte_of[letter] for letter in token)) for token, rank in vocabulary.items())
    target.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in ranks))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
