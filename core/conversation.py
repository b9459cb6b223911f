"""Conversations: the items that a client sends and a node renders.

Translates the Responses API's `input` into `Item`s and back out of finished responses. Does not
know how an item becomes token ids (the node owns speech) nor where responses are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, Literal, TypeAlias

import msgspec

from core.errors import RequestError

Kind: TypeAlias = Literal["message", "reasoning", "function_call", "function_call_output"]

MAX_ITEMS = 4096
_PREFIX_KEY_BYTES = 16
_ROLES = {"user", "assistant", "system", "developer", "tool"}
_TEXT_PARTS = {"input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal"}
_OTHER_PARTS = {"input_image", "input_audio", "input_file", "image_url"}


class Item(msgspec.Struct, frozen=True, array_like=True):
    """One element of a conversation.

    ids: the ids that were generated for this item, without its terminator; None when it was
    written by somebody else. They are used for rendering only under the release that made them.
    """

    kind: Kind
    role: str
    text: str
    ids: list[int] | None = None
    release: str = ""
    name: str = ""
    call_id: str = ""
    phase: str = ""


def prefix_keys(items: Iterable[Item], release: str, salt: str) -> list[str]:
    """The i-th key stands for all that items[0..i] say, under one release and one tenant's salt: 128 bits, in hex.

    Never over ids: an item that was generated here and the same one sent back by its client are one.
    """
    running = blake2b(digest_size=_PREFIX_KEY_BYTES, key=blake2b(salt.encode()).digest())
    running.update(_framed(release))
    keys: list[str] = []
    for item in items:
        for value in (item.kind, item.role, item.text, item.name, item.call_id, item.phase):
            running.update(_framed(value))
        keys.append(running.hexdigest())
    return keys


def _framed(text: str) -> bytes:
    """With its length before it, so that no two lists of texts are the same bytes; also half a surrogate pair."""
    data = text.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "little") + data


def parse_input(value: object) -> list[Item]:
    """The `input` of a request, a string or a list of items; raises RequestError naming the element."""
    if isinstance(value, str):
        return [Item("message", "user", value)]
    if not isinstance(value, list):
        raise RequestError("`input` must be a string or a list of items.", param="input")
    if len(value) > MAX_ITEMS:
        raise RequestError(f"`input` has {len(value)} items, at most {MAX_ITEMS} are taken.", param="input")
    return [_item(element, f"input[{index}]") for index, element in enumerate(value)]


def _item(element: object, where: str) -> Item:
    if not isinstance(element, dict):
        raise RequestError(f"`{where}` must be an object.", param=where)
    kind = element.get("type", "message")
    match kind:
        case "message":
            role = element.get("role")
            if not isinstance(role, str) or role not in _ROLES:
                raise RequestError(f"`{where}.role` must be one of {', '.join(sorted(_ROLES))}.", param=f"{where}.role")
            phase = element.get("phase")
            text = text_of(element.get("content"), f"{where}.content")
            return Item("message", role, text, phase=phase if isinstance(phase, str) else "")
        case "reasoning":
            return Item("reasoning", "assistant", text_of(element.get("content") or "", f"{where}.content"))
        case "function_call":
            return Item(
                "function_call",
                "assistant",
                _string(element, "arguments", where),
                name=_string(element, "name", where),
                call_id=_string(element, "call_id", where),
            )
        case "function_call_output":
            output = text_of(element.get("output"), f"{where}.output")
            return Item("function_call_output", "tool", output, call_id=_string(element, "call_id", where))
        case _:
            raise RequestError(
                f"`{where}.type` is {kind!r:.60}, which is not an item type that is served here.", param=where
            )


def _string(element: dict[str, Any], key: str, where: str) -> str:
    value = element.get(key)
    if not isinstance(value, str):
        raise RequestError(f"`{where}.{key}` must be a string.", param=f"{where}.{key}")
    return value


def text_of(content: object, where: str) -> str:
    """Content as text: a string, or a list of text parts; raises RequestError naming the field `where`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"`{where}` must be a string or a list of parts.", param=where)
    texts: list[str] = []
    for index, part in enumerate(content):
        texts.append(_text_of_part(part, f"{where}[{index}]"))
    return "".join(texts)


def _text_of_part(part: object, where: str) -> str:
    fields = part if isinstance(part, dict) else {}
    kind = fields.get("type")
    if isinstance(kind, str) and kind in _OTHER_PARTS:
        raise RequestError(f"`{where}` is {kind!r}; this deployment takes text only.", param=where)
    text = fields.get("refusal" if kind == "refusal" else "text")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS or not isinstance(text, str):
        raise RequestError(f"`{where}` must be a text part.", param=where)
    return text
