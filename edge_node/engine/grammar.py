"""Which ids may come next, so that an answer is a JSON document of the form that was asked for.

    Grammars   one release's vocabulary; compiles a schema once, however many streams ask for it
    Guide      one answer's place in that grammar

llguidance follows the bytes of the ids, in the same table that `Detokeniser` reads them from, so it does not matter
how the text is cut into ids. A guide is rebuilt by pushing the same ids again. Documents are written without
whitespace between their parts: a small model would go on with it for ever.

Pure: nothing is fetched, nothing is timed. Does not know sampling, nor which ids are the answer (`Parser.answering`).
docs/decisions/024-grammar.md
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from core.errors import ReleaseError, UnsupportedParameter
from core.limits import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH
from core.manifest import Manifest
from edge_node.engine.speech.detokeniser import byte_table

# A schema is compiled between two steps of everybody else's answers: the worst within these limits, and those that the
# router knows too (core/limits), takes 0.2 s.
MAX_PROPERTIES = 1_000
MAX_OPTIONAL = 400
"""Of the properties: each of them is a way to go on at the same place, and the library has 2,000 for all ways."""

MAX_MULTIPLE = 10_000
"""Of the product of all different `multipleOf`: the automaton has a state for each remainder, and allOf multiplies."""

MAX_KEPT = 16
"""Compiled schemas, and refusals, that are kept for the next request."""

_JSON_OBJECT = {"type": "object"}
# `lenient` would leave out what the library cannot hold; whoever asks for a schema is told instead.
_OPTIONS = {
    "whitespace_flexible": False,
    "json_allow_general_unicode_escapes": True,
    "lenient": False,
    "coerce_one_of": False,
}
# Forcing would admit one spelling only of what has to come next, and call the tokenizer for it.
_GRAMMAR = '%llguidance {"no_forcing": true}\nstart: %json '
_PROBE_IDS = 3
_MAX_REASON_CHARACTERS = 200
# Around what the library says: where in our own grammar, and that grammar, line by line.
_NOISE_BEFORE = re.compile(r'^(at \d+\(\d+\): )?(failed to (compile JSON schema|parse "%json"): )?')
_NOISE_AFTER = re.compile(r"\n +1 \| .*|\n<non-verbose/>.*|\n  while processing .*|\. Enable .*", re.DOTALL)
_PLAINLY = (
    (re.compile(r"panic:.*", re.DOTALL), "the schema is too large or too entangled"),
    (re.compile(r"NoExtension.*", re.DOTALL), "there is no document that satisfies the schema"),
    (re.compile(r"Unimplemented keys: \[(.*)\]"), r"the schema's \1 cannot be enforced"),
    (re.compile(r"Resource ('.*') is not present in a registry .*"), r"\1 lies outside the schema and is not fetched"),
    (re.compile(r"Parser Error: Current row has .*", re.DOTALL), "the schema allows too much at one place"),
    (re.compile(r"(lexer error|Unable to determine if regex).*", re.DOTALL), "the schema's strings are too entangled"),
    (re.compile(r"oneOf .*"), "the schema has a oneOf whose cases may not exclude each other"),
    (re.compile(r"regex parse error:\n *(.*?)\n[\s^]*\nerror: ", re.DOTALL), r"the pattern \1 cannot be followed: "),
)
"""What the library says, and what its words mean for whoever wrote the schema; anything else is repeated as it is."""


class UnsupportedFormat(UnsupportedParameter):
    """An answer cannot be held to the format that the request asks for."""

    def __init__(self, reason: str) -> None:
        """reason: a clause without a full stop."""
        self.reason = reason
        super().__init__(
            f"`text.format` cannot be held: {reason}; change that in the schema, or ask for `text`.",
            param="text.format",
        )


class Grammars:
    """The grammars of one release. Invariant: at most MAX_KEPT are kept, those asked for last."""

    def __init__(self, table: Sequence[bytes], tokenizer_size: int, closing_ids: frozenset[int]) -> None:
        """table: the bytes of each id, b"" where it has no text (special tokens). Raises ReleaseError."""
        self._size = tokenizer_size
        self._closing = np.array(sorted(token for token in closing_ids if token < tokenizer_size), dtype=np.intp)
        if not self._closing.size:
            raise ReleaseError("The release names no id that ends an answer; export the model again.")
        padded = [*table[:tokenizer_size], *[b""] * (tokenizer_size - len(table))]
        for token in self._closing:
            padded[token] = b""
        try:
            self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(padded)), slices=LLTokenizer.json_slices())
        except ValueError as error:
            raise ReleaseError(f"No grammar can follow the release's tokenizer ({error}); use another one.") from error
        self._limits = LLParserLimits(
            initial_lexer_fuel=200_000,
            step_lexer_fuel=100_000,
            max_lexer_states=20_000,
            max_grammar_size=50_000,
            precompute_large_lexemes=False,
            verbose_errors=False,
        )
        self._compiled = 0
        self._kept: OrderedDict[bytes, LLMatcher | str] = OrderedDict()

    @classmethod
    def open(cls, manifest: Manifest, tokenizer_json: str, closing_ids: frozenset[int]) -> Grammars:
        """From the contents of the release's tokenizer.json; raises ReleaseError."""
        try:
            table = byte_table(msgspec.json.decode(tokenizer_json))
        except (msgspec.MsgspecError, LookupError, TypeError, AttributeError) as error:
            raise ReleaseError(f"{manifest.tokenizer} is not a tokenizer: {error}; export the model again.") from error
        return cls(table, manifest.tokenizer_size, closing_ids)

    @property
    def kept(self) -> int:
        """How many schemas, refused ones included, need not be compiled again."""
        return len(self._kept)

    @property
    def compiled(self) -> int:
        """How many have been, ever."""
        return self._compiled

    def guide(self, format: dict[str, Any]) -> Guide:
        """A guide at the beginning of an answer. format: what the Responses API calls `text.format`.

        Raises UnsupportedFormat.
        """
        schema = _encode(_schema_of(format))
        key = blake2b(schema, digest_size=16).digest()
        kept = self._kept.pop(key, None)
        self._kept[key] = kept = self._compile(schema.decode()) if kept is None else kept
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        if isinstance(kept, str):
            raise UnsupportedFormat(kept)
        return Guide(kept.deep_copy(), self._size, self._closing)

    def _compile(self, schema: str) -> LLMatcher | str:
        """A matcher at the beginning, never advanced, only copied; or the reason why there is none."""
        self._compiled += 1
        matcher = LLMatcher(self._tokenizer, _GRAMMAR + schema, log_level=0, limits=self._limits)
        if matcher.is_error():
            return _reason(matcher.get_error())
        # Every copy begins with this mask, and has what the lexer learnt for it.
        matcher.compute_bitmask()
        probe = Guide(matcher.deep_copy(), self._size, self._closing)
        try:
            for _ in range(_PROBE_IDS):
                probe.push(int(np.argmax(probe.allowed())))
        except UnsupportedFormat as refusal:
            return refusal.reason
        return matcher


class Guide:
    """One answer's place in its grammar: a function of the ids pushed so far.

    An id that the grammar does not allow makes the guide let go: from then on every id is allowed. The engine never
    samples such an id; it can only be given with a request that continues an answer from elsewhere, held there by
    other rules. The document is broken by then, whatever follows; forbidding what follows would end in no id at all.
    """

    def __init__(self, matcher: LLMatcher, tokenizer_size: int, closing: NDArray[np.intp]) -> None:
        """matcher: at the beginning, this guide's own. closing: the ids that may end a complete document."""
        self._matcher = matcher
        self._size = tokenizer_size
        self._closing = closing
        self._holds = True

    @property
    def holds(self) -> bool:
        """Whether all ids so far were allowed."""
        return self._holds

    def allowed(self) -> NDArray[np.bool_]:
        """[tokenizer_size], which ids may come next, at least one; closing ids exactly when the text is a document.

        Raises UnsupportedFormat where the grammar became too large to follow, or nothing can follow: ends this answer.
        """
        if not self._holds:
            return np.ones(self._size, dtype=np.bool_)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        complete = self._matcher.is_accepting()
        if self._matcher.is_error():
            raise UnsupportedFormat(_reason(self._matcher.get_error()))
        allowed = np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)
        allowed[self._closing] = complete
        if not allowed.any():
            raise UnsupportedFormat("there is a place where nothing satisfies it")
        return allowed

    def push(self, token: int) -> None:
        """The id that came next; never raises."""
        if self._holds and not (token in self._closing and self._matcher.is_accepting()):
            self._holds = token < self._size and self._follow(token)

    def _follow(self, token: int) -> bool:
        """Whether the grammar allows the id. One that it allows and is too large to follow is `allowed`'s to report."""
        if self._matcher.is_error():
            return True
        if self._matcher.validate_tokens([token]) == 0 and not self._matcher.is_error():
            return False
        self._matcher.consume_token(token)
        return True


class _Vocabulary:
    """What TokenizerWrapper asks of a tokenizer: the bytes of its ids, and one id more to mean the end of all text.

    The release's closing ids cannot be that id: they are masked here, and may be several.
    """

    bos_token_id = None

    def __init__(self, table: list[bytes]) -> None:
        self.tokens = [*table, b"<end>"]
        self.eos_token_id = len(table)
        self.special_token_ids = [len(table)]

    def __call__(self, text: str | bytes) -> list[int]:
        """Only forcing encodes text."""
        raise NotImplementedError("Grammars are compiled with no_forcing.")


def _schema_of(format: dict[str, Any]) -> dict[str, Any]:
    """The schema of a format."""
    match format:
        case {"type": "json_object"}:
            return _JSON_OBJECT
        case {"type": "json_schema", "schema": dict(schema)}:
            return schema
        case {"type": "json_schema"}:
            raise UnsupportedFormat("`schema` is no JSON object")
        case _:
            raise UnsupportedFormat(f"the type {format.get('type')!r:.60} is neither json_schema nor json_object")


def _encode(schema: dict[str, Any]) -> bytes:
    """The schema with our options, as JSON; raises UnsupportedFormat beyond the limits of this module."""
    _check(schema)
    try:
        encoded = msgspec.json.encode(schema | {"x-guidance": _OPTIONS})
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise UnsupportedFormat(f"the schema is not JSON ({error})") from error
    if len(encoded) > MAX_SCHEMA_BYTES:
        raise UnsupportedFormat(f"the schema has {len(encoded)} bytes, more than {MAX_SCHEMA_BYTES}")
    return encoded


def _check(schema: dict[str, Any]) -> None:
    """Raise UnsupportedFormat for what the library would take long over, or recurse into."""
    properties = optional = 0
    multiples: set[int] = set()
    for depth, value in _objects(schema):
        if depth > MAX_SCHEMA_DEPTH:
            raise UnsupportedFormat(f"the schema nests more than {MAX_SCHEMA_DEPTH} levels deep")
        if isinstance(named := value.get("properties"), dict):
            properties += len(named)
            optional += len(named.keys() - _names(value.get("required")))
        if isinstance(multiple := value.get("multipleOf"), int | float) and 0 < multiple < 2**32:
            multiples.add(_coefficient(float(multiple)))
    if properties > MAX_PROPERTIES:
        raise UnsupportedFormat(f"the schema has {properties} properties, more than {MAX_PROPERTIES}")
    if optional > MAX_OPTIONAL:
        raise UnsupportedFormat(f"{optional} of the schema's properties are not `required`, more than {MAX_OPTIONAL}")
    if math.prod(multiples) > MAX_MULTIPLE:
        raise UnsupportedFormat(f"the schema's different `multipleOf` have a product of more than {MAX_MULTIPLE}")


def _objects(schema: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every JSON object in the schema and how deep it lies; the caller stops before it is too deep."""
    waiting: list[tuple[int, Any]] = [(0, schema)]
    while waiting:
        depth, value = waiting.pop()
        match value:
            case dict():
                yield depth, value
                waiting += [(depth + 1, inner) for inner in value.values()]
            case list():
                waiting += [(depth + 1, inner) for inner in value]


def _names(required: Any) -> set[str]:
    """The names in a `required`, whatever else a client wrote there."""
    return {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()


def _coefficient(value: float) -> int:
    """A number's digits without the point, as the library counts them: 0.25 has 25."""
    while value % 1:
        value *= 10
    return int(value)


def _reason(error: str) -> str:
    """What the library says, as one clause, without our grammar around it."""
    words = _NOISE_BEFORE.sub("", _NOISE_AFTER.sub("", error), count=1)
    for pattern, plainly in _PLAINLY:
        words = pattern.sub(plainly, words, count=1)
    return " ".join(words.split())[:_MAX_REASON_CHARACTERS].rstrip(" .")
