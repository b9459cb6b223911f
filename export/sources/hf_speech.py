"""Tokenizer, chat template and special ids out of a Hugging Face folder's files.

`tokenizer.json` is carried byte for byte: it is what the runtime loads, so it is loaded here too and refused here if
it cannot be. Precedence of the others: transformers 5.23. Does not know where the files lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import msgspec
from tokenizers import Tokenizer

from export.errors import SourceError
from export.sources.hf_json import decode_json, shown
from export.sources.speech import END_TEXTS, Speech
from export.spec import DecoderSpec, Family

#: What ends generation in the harmony format; <|end|> only ends a message there, the next one may follow.
_HARMONY_END_TEXTS = ("<|return|>", "<|call|>")

_MAX_TEMPLATE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class SpeechFiles:
    """Contents of the files, None where there is none; `folder` is what messages call the place."""

    folder: str
    config: bytes
    tokenizer: bytes | None
    tokenizer_config: bytes | None
    chat_template: bytes | None
    generation_config: bytes | None


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_Added] = []
    truncation: dict[str, object] | None = None
    padding: dict[str, object] | None = None


class _Text(msgspec.Struct):
    content: str


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    bos_token: str | _Text | None = None
    eos_token: str | _Text | None = None
    chat_template: str | list[_NamedTemplate] | None = None


class _Ends(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


@dataclass(frozen=True)
class _Vocabulary:
    """Ids by text, and the texts that are special tokens."""

    ids: Mapping[str, int]
    special: frozenset[str]
    folder: str

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self.ids.values()) + 1

    def id_of(self, token: str | _Text | None, file: str) -> int | None:
        """The id of a token that `file` names; raises SourceError if there is no such token."""
        if token is None:
            return None
        text = token if isinstance(token, str) else token.content
        if text not in self.ids:
            raise SourceError(
                f"{self.folder}/{file} names the token {shown(text)}, which tokenizer.json does not have; "
                "fetch both again."
            )
        return self.ids[text]


def read_speech(files: SpeechFiles, spec: DecoderSpec) -> Speech:
    """Everything about text; raises SourceError naming the file that is missing, damaged or of no use."""
    tokenizer = _tokenizer_json(files)
    vocabulary = _vocabulary(tokenizer, files.folder, spec)
    settings = _decode(files.tokenizer_config, _TokenizerConfig, files.folder, "tokenizer_config.json")
    return Speech(
        tokenizer_json=tokenizer,
        chat_template=None if spec.family is Family.GPT_OSS else _chat_template(files, settings),
        stop_ids=_stop_ids(files, settings, vocabulary, spec),
        bos_id=vocabulary.id_of(settings.bos_token, "tokenizer_config.json"),
        size=vocabulary.size,
    )


def check_template(template: str, where: str) -> None:
    """Raise SourceError, naming `where`, for a chat template that is no Jinja or longer than any model's."""
    if len(template) > _MAX_TEMPLATE_CHARACTERS:
        raise SourceError(
            f"The chat template in {where} has {len(template)} characters, more than this exporter's limit of "
            f"{_MAX_TEMPLATE_CHARACTERS}; put another there."
        )
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except (jinja2.TemplateError, RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        reason = f"{error!s:.200}"
        raise SourceError(f"The chat template in {where} cannot be used ({reason}); put another there.") from error


def _decode(data: bytes | None, kind: type[Any], folder: str, file: str) -> Any:
    """A file that may be missing: then everything in it is."""
    return kind() if data is None else decode_json(data, kind, f"{folder}/{file}")


def _tokenizer_json(files: SpeechFiles) -> bytes:
    if files.tokenizer is None:
        raise SourceError(
            f"{files.folder} has no tokenizer.json; where older files lie there, "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) makes one of them."
        )
    return files.tokenizer


def _vocabulary(data: bytes, folder: str, spec: DecoderSpec) -> _Vocabulary:
    where = f"{folder}/tokenizer.json"
    stated = decode_json(data, _TokenizerFile, where)
    _refuse_other_lengths(stated, where)
    added = stated.added_tokens
    ids = _loaded_ids(data, where)
    if not ids:
        raise SourceError(f"{where} has no tokens; fetch it again.")
    for token in added:
        # The library closes gaps between ids without a word; then the model would hear other tokens than are written.
        loaded = ids.get(token.content)
        if loaded != token.id:
            raise SourceError(
                f"{where} gives {shown(token.content)} the id {token.id}, but it is loaded as {loaded}: "
                "the ids have a gap or occur twice; fetch it again."
            )
    highest = max(ids, key=ids.__getitem__)
    if ids[highest] >= spec.vocab:
        raise SourceError(
            f"{where} gives {shown(highest)} the id {ids[highest]}, but config.json has a vocab_size of {spec.vocab}; "
            "the files are not of one model, fetch them again."
        )
    return _Vocabulary(ids, frozenset(token.content for token in added if token.special), folder)


def _refuse_other_lengths(stated: _TokenizerFile, where: str) -> None:
    """What a training run left there would cut prompts or fill them up; some of it makes the library panic."""
    for key, value in (("truncation", stated.truncation), ("padding", stated.padding)):
        if value is not None:
            raise SourceError(f"{where} sets {key!r}, which would change prompts; set it to null there.")


def _loaded_ids(data: bytes, where: str) -> dict[str, int]:
    """Ids by text, as the library understands the file."""
    try:
        ids: dict[str, int] = Tokenizer.from_buffer(data).get_vocab(with_added_tokens=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and panics, which is not even one
        raise SourceError(f"{where} is not a tokenizer ({error}); fetch it again.") from error
    return ids


def _stop_ids(
    files: SpeechFiles, settings: _TokenizerConfig, vocabulary: _Vocabulary, spec: DecoderSpec
) -> tuple[int, ...]:
    """The end-of-sequence id first: the one that a template calls eos_token, if the folder names it."""
    stated = [
        *_stated_ends(files.config, "config.json", files.folder, vocabulary),
        *_stated_ends(files.generation_config, "generation_config.json", files.folder, vocabulary),
    ]
    named = vocabulary.id_of(settings.eos_token, "tokenizer_config.json")
    first = named if named is not None else next(iter(stated), None)
    if first is None:
        raise SourceError(
            f"{files.folder} names no end-of-sequence token (eos_token in tokenizer_config.json, eos_token_id in "
            "config.json or generation_config.json); fetch it again."
        )
    ends = {first, *stated, *_known_ends(vocabulary, spec)}
    return (first, *sorted(ends - {first}))


def _known_ends(vocabulary: _Vocabulary, spec: DecoderSpec) -> list[int]:
    if spec.family is not Family.GPT_OSS:
        return [vocabulary.ids[text] for text in END_TEXTS & vocabulary.special]
    missing = [text for text in _HARMONY_END_TEXTS if text not in vocabulary.special]
    if missing:
        raise SourceError(
            f"{vocabulary.folder}/tokenizer.json has no special token {shown(missing[0])}, which the harmony format "
            "needs; take the tokenizer of openai/gpt-oss-20b."
        )
    return [vocabulary.ids[text] for text in _HARMONY_END_TEXTS]


def _stated_ends(data: bytes | None, file: str, folder: str, vocabulary: _Vocabulary) -> list[int]:
    stated = _decode(data, _Ends, folder, file).eos_token_id
    ids: list[int] = [] if stated is None else [stated] if isinstance(stated, int) else stated
    for token in ids:
        if not 0 <= token < vocabulary.size:
            raise SourceError(
                f"{folder}/{file} says eos_token_id {token}, but the tokenizer's ids end before {vocabulary.size}; "
                "fetch both again."
            )
    return ids


def _chat_template(files: SpeechFiles, settings: _TokenizerConfig) -> str:
    template, file = _template_text(files, settings)
    check_template(template, f"{files.folder}/{file}")
    return template


def _template_text(files: SpeechFiles, settings: _TokenizerConfig) -> tuple[str, str]:
    """The template and the file that it stands in; a file of its own comes first."""
    if files.chat_template is not None:
        try:
            return files.chat_template.decode(), "chat_template.jinja"
        except UnicodeDecodeError as error:
            raise SourceError(f"{files.folder}/chat_template.jinja is not UTF-8 ({error}); fetch it again.") from error
    match settings.chat_template:
        case str(text) if text:
            return text, "tokenizer_config.json"
        case list(templates):
            for named in templates:
                if named.name == "default":
                    return named.template, "tokenizer_config.json"
    raise SourceError(
        f"{files.folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
        "export an instruct model, or put the template of one there."
    )
