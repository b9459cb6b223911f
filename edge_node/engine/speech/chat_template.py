"""Models that speak through a jinja chat template: one message per answer, ended by a stop id.

The template sees placeholders instead of contents. Contents are encoded apart, without looking for
special tokens, so that nobody can write an `<|im_end|>` that ends their message; an item that the same
release generated is spliced in as the ids it was made of. A template that inspects contents (trims
them, say) therefore sees the placeholder. docs/decisions/022-rendering-by-placeholders.md.

Pure: the sandbox has no clock and no randomness. Does not know where the template came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NoReturn

import jinja2
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from core.conversation import Item
from core.errors import ReleaseError, ServiceError
from core.frames import Delta, ItemEnd, ItemStart, Text
from core.manifest import Manifest
from edge_node.engine.speech.chat_layout import Said, lay_out, placeholder
from edge_node.engine.speech.detokeniser import Detokeniser, byte_table, drops_first_space
from edge_node.engine.speech.prompt import PromptEncoder
from edge_node.engine.speech.rendered import Rendered
from edge_node.engine.speech.setting import PLAIN, Setting
from edge_node.engine.speech.stop_strings import StopStrings

# What a template may write around the contents.
MAX_TEMPLATE_CHARACTERS = 1024 * 1024

_ROLES = {"developer": "system", "tool": "user"}


class SpeechError(ServiceError):
    """A conversation that the release's own template refuses or cannot render."""


class ChatTemplateSpeech:
    """Speech of a release whose manifest says `chat_template`."""

    def __init__(
        self, manifest: Manifest, encoder: PromptEncoder, table: list[bytes], drop_first_space: bool, template: str
    ) -> None:
        """table: the bytes of each id. drop_first_space: of an answer, see `detokeniser.drops_first_space`."""
        self._stop_ids = frozenset(manifest.stop_ids)
        self._encoder = encoder
        self._table = table
        self._drop_first_space = drop_first_space
        self._variables = {
            "bos_token": _token(encoder.marked, manifest.bos_id),
            "eos_token": _token(encoder.marked, *manifest.stop_ids[:1]),
        }
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateError as error:
            raise ReleaseError(f"The chat template is not valid jinja: {error}; export the model again.") from error

    @classmethod
    def from_files(cls, manifest: Manifest, tokenizer_json: str, template: str) -> ChatTemplateSpeech:
        """From the contents of the release's files; raises ReleaseError."""
        try:
            # Two, because whether special tokens are recognised is a property of the object.
            plain, marked = Tokenizer.from_str(tokenizer_json), Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise ReleaseError(f"{manifest.tokenizer} is not a tokenizer: {error}; export the model again.") from error
        plain.encode_special_tokens = True
        parsed = msgspec.json.decode(tokenizer_json)
        table = byte_table(parsed)
        encoder = PromptEncoder(plain, marked, parsed, table)
        return cls(manifest, encoder, table, drops_first_space(parsed), template)

    @property
    def closing_ids(self) -> frozenset[int]:
        return self._stop_ids

    def bytes_of(self, token: int) -> bytes:
        """The table has none for special tokens: in an answer they are no text."""
        known = 0 <= token < len(self._table)
        return self._table[token] or _token(self._encoder.marked, token).encode() if known else b""

    def lay_out(self, items: list[Item], release: str, setting: Setting = PLAIN) -> Rendered:
        """Prompt ids with the generation prompt at the end; raises SpeechError. Such a template knows no settings."""
        told = [item for item in items if item.kind != "reasoning"]
        said = [_said(item, item.ids if item.release == release else None) for item in told]
        text = self._fill([message.role for message in said], True)
        laid = lay_out(self._encoder, text, said, self._fill_or_none)
        ends = [0, *laid.ends]
        count = accumulate(item.kind != "reasoning" for item in items)
        return Rendered(laid.ids, [ends[number] for number in count])

    def least_tokens(self, items: list[Item], release: str, setting: Setting = PLAIN) -> int:
        """What `PromptEncoder.least` says of each content."""
        said = [item for item in items if item.kind != "reasoning"]
        return sum(
            len(item.ids) if item.ids is not None and item.release == release else self._encoder.least(item.text)
            for item in said
        )

    def start(self, stop: Sequence[str] = ()) -> ChatTemplateParser:
        detokeniser = Detokeniser(self._table, self._drop_first_space)
        return ChatTemplateParser(detokeniser, self._stop_ids, StopStrings(stop))

    def _fill_or_none(self, roles: list[str], answer: bool) -> str | None:
        try:
            return self._fill(roles, answer)
        except SpeechError:
            return None

    def _fill(self, roles: list[str], answer: bool) -> str:
        """answer: whether to write what an answer begins with."""
        messages = [{"role": role, "content": placeholder(index)} for index, role in enumerate(roles)]
        most = MAX_TEMPLATE_CHARACTERS + sum(len(message["content"]) for message in messages)
        written, size = [], 0
        try:
            for piece in self._template.generate(messages=messages, add_generation_prompt=answer, **self._variables):
                size += len(piece)
                if size > most:
                    raise SpeechError(
                        f"The release's chat template wrote more than {most} characters; use another release."
                    )
                written.append(piece)
        except _Refused as error:
            raise SpeechError(f"The model's chat template refuses this conversation: {error}.") from error
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise SpeechError(
                f"The release's chat template failed ({type(error).__name__}); report this with the release's name."
            ) from error
        return "".join(written)


class ChatTemplateParser:
    """One message. The first id opens it; the stop id closes it and has no text."""

    def __init__(self, detokeniser: Detokeniser, stop_ids: frozenset[int], stops: StopStrings) -> None:
        self._detokeniser = detokeniser
        self._stop_ids = stop_ids
        self._stops = stops
        self._opened = False
        self._closed = False

    @property
    def reasoning_tokens(self) -> int:
        """What it says is all answer."""
        return 0

    @property
    def stopped(self) -> bool:
        """A stop id or a stop string was heard."""
        return self._closed or self._stops.found

    @property
    def answering(self) -> bool:
        """What it says is all answer."""
        return not self.stopped

    def push(self, token: int, last: bool = False) -> list[Delta]:
        deltas: list[Delta] = [] if self._opened else [ItemStart("message")]
        self._opened = True
        self._closed = token in self._stop_ids
        text = "" if self._closed else self._stops.push(self._detokeniser.push(token))
        if self._closed or last:
            text += self._stops.flush()
        if text:
            deltas.append(Text(text))
        if self._closed:
            deltas.append(ItemEnd())
        return deltas


def _said(item: Item, ids: list[int] | None) -> Said:
    """Calls and their outputs become plain text: a chat template of this kind knows no tools."""
    match item.kind:
        case "function_call":
            return Said("assistant", f"{item.name}({item.text})", ids)
        case "message" | "reasoning" | "function_call_output":
            return Said(_ROLES.get(item.role, item.role), item.text, ids)


class _Refused(Exception):
    """The template called raise_exception."""


def _refuse(message: object) -> NoReturn:
    raise _Refused(str(message)[:200].rstrip("."))


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers sets it up, less what is not a function of its arguments."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    del environment.globals["lipsum"], environment.filters["random"]
    environment.globals["raise_exception"] = _refuse
    return environment


def _token(tokenizer: Tokenizer, token: int | None = None) -> str:
    return "" if token is None else tokenizer.id_to_token(token) or ""
