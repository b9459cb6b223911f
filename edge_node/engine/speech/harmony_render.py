"""Conversations as gpt-oss reads them: items to prompt ids, and where each item ends among them.

    <|start|>system<|message|>...<|end|>  <|start|>developer<|message|>...<|end|>     this request's setting
    <|start|>user<|message|>hi<|end|>                                                 items
    <|start|>assistant<|channel|>final<|message|>hello<|end|>
    <|start|>assistant                                                                the answer begins here

Contents and names are encoded apart from the special tokens around them, so that nobody can write one. An item
that this release generated is spliced in as the ids it was made of, header included, wherever they mean what the
item says: what was generated and what is re-read are then the same ids.

Does not know where a tokenizer comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeAlias

from core.conversation import Item
from edge_node.engine.speech.harmony_format import (
    ASSISTANT,
    CHANNELS,
    COMMENTARY,
    FUNCTIONS,
    START,
    Marks,
    item_of,
    read_header,
)
from edge_node.engine.speech.harmony_history import instructs, opening_instructions, said_again
from edge_node.engine.speech.harmony_prompt import developer_text, instructions_section, system_text
from edge_node.engine.speech.rendered import Rendered
from edge_node.engine.speech.setting import Setting

Encode: TypeAlias = Callable[[str], list[int]]

UNKNOWN_FUNCTION = "unknown"
"""Who answered, when the call that an output names is not in the conversation."""


class Renderer:
    """Writes prompts in one vocabulary. Holds nothing of a conversation."""

    def __init__(self, marks: Marks, encode: Encode, table: list[bytes], special: Collection[int]) -> None:
        """encode: text without a thought for special tokens. table: each id's bytes. special: ids no text becomes."""
        self._marks = marks
        self._encode = encode
        self._table = table
        self._special = frozenset(special)
        self._answer = [marks.start, *encode(ASSISTANT)]
        self._roles = {role: [marks.start, *encode(role), marks.message] for role in ("system", "developer", "user")}
        self._channels = {channel: [marks.channel, *encode(channel)] for channel in CHANNELS}
        self._json = [*encode(" "), marks.constrain, *encode("json"), marks.message]
        self._to_assistant = encode(f" to={ASSISTANT}")

    def render(self, items: list[Item], release: str, setting: Setting) -> Rendered:
        """The whole prompt, up to where the answer begins. Instructions that open the conversation share one message
        and end together with it.
        """
        opening = opening_instructions(items)
        ids = self._message("system", system_text(setting))
        if told := developer_text([item.text for item in items[:opening]], setting):
            ids += self._message("developer", told)
        ends = [len(ids)] * opening
        names = {item.call_id: item.name for item in items if item.kind == "function_call"}
        for said in list(said_again(items))[opening:]:
            if said is not None:
                ids += self._item(*said, release, names)
            ends.append(len(ids))
        return Rendered(ids + self._answer, ends)

    def _message(self, role: str, text: str) -> list[int]:
        return [*self._roles[role], *self._encode(text), self._marks.end]

    def _item(self, item: Item, channel: str, release: str, names: dict[str, str]) -> list[int]:
        if instructs(item):
            return self._message("developer", instructions_section(item.text))
        end = self._marks.call if item.kind == "function_call" else self._marks.end
        header, content = self._generated(item, release)
        if header:
            return [*header, *content, end]
        return [*self._head(item, channel, names), *(content or self._encode(item.text)), end]

    def _head(self, item: Item, channel: str, names: dict[str, str]) -> list[int]:
        """An item's header as the format writes it, `<|start|>` to `<|message|>`."""
        if item.kind == "function_call":
            to = self._encode(f" to={FUNCTIONS}{item.name}")
            return [*self._answer, *to, *self._channels[COMMENTARY], *self._json]
        if item.kind == "function_call_output" or item.role == "tool":
            name = FUNCTIONS + (item.name or names.get(item.call_id) or UNKNOWN_FUNCTION)
            head = [self._marks.start, *self._encode(name), *self._to_assistant]
            return [*head, *self._channels[COMMENTARY], self._marks.message]
        if channel:
            return [*self._answer, *self._channels[channel], self._marks.message]
        return self._roles["user"]

    def _generated(self, item: Item, release: str) -> tuple[list[int], list[int]]:
        """Header and content in the ids that they were made of; [] for what is not known or means something else.

        An item's ids begin with `<|start|>`, with what follows the prompt's last id, or with `<|message|>`; in the
        last case its header is not among them.
        """
        ids, mark = item.ids, self._marks.message
        if not ids or item.release != release:
            return [], []
        at = ids.index(mark) + 1 if mark in ids else 0
        header, content = ids[:at], ids[at:]
        if not self._special.isdisjoint(content) or self._text(content) != item.text:
            return [], []
        if len(header) < 2 or not self._says(header[:-1], item):
            return [], content
        return ([] if header[0] == self._marks.start else self._answer) + header, content

    def _says(self, header: list[int], item: Item) -> bool:
        """Whether a generated header makes the item what it is."""
        text = self._text(header)
        read = read_header(text.removeprefix(START), role="" if text.startswith(START) else ASSISTANT)
        if read is None:
            return False
        start = item_of(read)
        return (start.kind, start.phase, start.name) == (item.kind, item.phase, item.name)

    def _text(self, ids: list[int]) -> str:
        known, table = len(self._table), self._table
        return b"".join([table[token] for token in ids if 0 <= token < known]).decode("utf-8", "replace")
