"""What may come next is exactly what leads to a document of the asked form, whatever ids the text is cut into."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from core.errors import ReleaseError
from core.manifest import Manifest, decode_manifest
from edge_node.engine.grammar import MAX_KEPT, Grammars, Guide, UnsupportedFormat
from edge_node.engine.speech.detokeniser import Detokeniser, byte_table

ROOT = Path(__file__).resolve().parents[3]
MOST_IDS = 400
FREE_IDS = 40
"""After so many ids a walk takes the shortest way out."""


class Words:
    """A vocabulary with its grammars; `text_ids` are those that say something."""

    def __init__(self, grammars: Grammars, table: list[bytes], size: int, closing: frozenset[int]) -> None:
        self.grammars = grammars
        self.table = [*table, *[b""] * (size - len(table))]
        self.size = size
        self.closing = closing
        self.id_of = {spelt: token for token, spelt in enumerate(self.table) if spelt}

    def guide(self, schema: dict[str, Any]) -> Guide:
        return self.grammars.guide({"type": "json_schema", "name": "form", "schema": schema, "strict": True})

    def text(self, ids: Sequence[int]) -> str:
        """Strictly: half a character raises."""
        return b"".join(self.table[token] for token in ids).decode()

    def bytewise(self, text: str) -> list[int]:
        """The text, one id for each byte."""
        return [self.id_of[bytes([byte])] for byte in text.encode()]


def _small(release: Path) -> Words:
    manifest = decode_manifest((release / "manifest.json").read_bytes(), "manifest.json")
    return _opened(manifest, (release / manifest.tokenizer).read_text(), frozenset(manifest.stop_ids))


def _opened(manifest: Manifest, tokenizer_json: str, closing: frozenset[int]) -> Words:
    grammars = Grammars.open(manifest, tokenizer_json, closing)
    return Words(grammars, byte_table(json.loads(tokenizer_json)), manifest.tokenizer_size, closing)


@pytest.fixture(scope="module")
def smollm2(smollm2_release: Path) -> Words:
    """Byte-level, 49,152 ids."""
    return _small(smollm2_release)


@pytest.fixture(scope="module")
def gpt_oss(smollm2_release: Path) -> Words:
    """Byte-level, the genuine 200,019 ids, and a table padded to what the graph knows."""
    script = [sys.executable, "scripts/get-tokenizer"]
    path = subprocess.run(script, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    manifest = decode_manifest((smollm2_release / "manifest.json").read_bytes(), "manifest.json")
    manifest = msgspec.structs.replace(manifest, tokenizer_size=201_088, vocab_size=201_088)
    return _opened(manifest, (ROOT / path).read_text(), frozenset({200_002, 200_012}))


@pytest.fixture(scope="module")
def pieces(smollm2_release: Path) -> Words:
    """SentencePiece's spelling: "▁" for a space, `<0xE6>` for a byte, and a special token that looks like text."""
    manifest = decode_manifest((smollm2_release / "manifest.json").read_bytes(), "manifest.json")
    spelt = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        '{"',
        '":',
        '"}',
        "▁",
        "▁a",
        "é",
        "ab",
    ]
    tokenizer = {
        "model": {"type": "BPE", "vocab": {text: token for token, text in enumerate(spelt)}, "merges": []},
        "added_tokens": [{"id": token, "content": spelt[token], "special": True} for token in range(3)],
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    }
    size = len(spelt)
    return _opened(msgspec.structs.replace(manifest, tokenizer_size=size), json.dumps(tokenizer), frozenset({2}))


@pytest.fixture(scope="module", params=["smollm2", "gpt_oss", "pieces"])
def words(request: pytest.FixtureRequest) -> Words:
    """Each of the vocabularies."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Words)
    return found


def walk(words: Words, guide: Guide, seed: int) -> list[int]:
    """Ids drawn from what is allowed until a closing id is drawn; without that id."""
    draw = random.Random(seed)
    ids: list[int] = []
    for _ in range(MOST_IDS):
        allowed = guide.allowed()
        assert allowed.shape == (words.size,)
        open_ids = np.flatnonzero(allowed)
        assert len(open_ids)
        closings = words.closing & set(open_ids.tolist())
        assert closings in (frozenset(), words.closing)
        out = _out(words, allowed) if len(ids) >= FREE_IDS else None
        token = int(draw.choice(open_ids)) if out is None else out
        if token not in words.closing and draw.random() < 0.5 and out is None:
            token = _single(words, open_ids, draw) or token
        guide.push(token)
        if token in words.closing:
            assert guide.holds
            return ids
        ids.append(token)
    raise AssertionError(f"no end after {words.text(ids)!r}")


def _out(words: Words, allowed: np.ndarray[Any, np.dtype[np.bool_]]) -> int | None:
    """The first of what leads out: an end, the end of a string, of an object, of an array, a digit, what separates."""
    ways = [*sorted(words.closing), *(words.id_of[way] for way in (b'"', b"}", b"]", b"1", b"0", b",", b":"))]
    return next((token for token in ways if allowed[token]), None)


def _single(words: Words, open_ids: np.ndarray[Any, np.dtype[np.intp]], draw: random.Random) -> int | None:
    """One of the ids with one byte: without them walks are nearly all words."""
    singles = [token for token in open_ids.tolist() if len(words.table[token]) == 1]
    return draw.choice(singles) if singles else None


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Colour(StrEnum):
    RED = "rot"
    BLUE = 'sky "blue"\n'
    GREEN = "緑🌿"


class Point(Strict):
    x: int = Field(ge=-3, le=12)
    y: float = Field(gt=0, le=1.5)


class Circle(Strict):
    kind: Literal["circle"]
    centre: Point
    radius: float | None


class Square(Strict):
    kind: Literal["square"]
    corners: list[Point] = Field(min_length=1, max_length=3)


class Drawing(Strict):
    """Nested objects, enums, bounded arrays, numbers, anyOf, references, and what need not be there."""

    title: Annotated[str, Field(min_length=1, max_length=7)]
    code: Annotated[str, Field(pattern="^[A-Z]{2}-[0-9]{3}$")]
    colours: list[Colour] = Field(max_length=2)
    shape: Circle | Square
    visible: bool
    note: str | None = None


class Tree(Strict):
    """Refers to itself."""

    name: Annotated[str, Field(max_length=3)]
    children: list[Tree] = Field(max_length=2)


class Catalogue(Strict):
    """Keys that are not known before."""

    prices: dict[str, Annotated[int, Field(ge=0)]]
    größe: Literal[1, "viel", True, None]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("model", [Drawing, Tree, Catalogue], ids=lambda model: model.__name__)
def test_whatever_is_drawn_from_what_is_allowed_is_valid(words: Words, model: type[BaseModel], seed: int) -> None:
    text = words.text(walk(words, words.guide(model.model_json_schema()), seed))
    model.model_validate_json(text, strict=True)
    assert not text.startswith((" ", "\n"))


SCHEMAS: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "number": ({"type": "number"}, lambda value: isinstance(value, int | float)),
    "integer": ({"type": "integer", "minimum": 7, "maximum": 1203}, lambda value: 7 <= value <= 1203),
    "steps": ({"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 9}, lambda value: value % 0.25 == 0),
    "string": ({"type": "string", "maxLength": 4}, lambda value: len(value) <= 4),
    "array": (
        {"type": "array", "prefixItems": [{"const": "a"}, {"type": "null"}], "items": False, "minItems": 2},
        lambda value: value == ["a", None],
    ),
    "types": ({"type": ["boolean", "null"]}, lambda value: value in (True, False, None)),
    "whole": (
        {"allOf": [{"$ref": "#/$defs/a"}, {"required": ["b"]}], "$defs": {"a": {"properties": {"b": {"const": "é"}}}}},
        lambda value: not isinstance(value, dict) or value["b"] == "é",
    ),
    "anything": ({}, lambda value: True),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_document_may_be_something_else_than_an_object(words: Words, name: str, seed: int) -> None:
    schema, holds = SCHEMAS[name]
    value = json.loads(words.text(walk(words, words.guide(schema), seed)))
    assert holds(value), value


@pytest.mark.parametrize("seed", range(12))
def test_json_object_is_any_object_and_nothing_else(words: Words, seed: int) -> None:
    text = words.text(walk(words, words.grammars.guide({"type": "json_object"}), seed))
    assert isinstance(TypeAdapter(dict[str, Any]).validate_json(text), dict)


@pytest.mark.parametrize("text", ["ü", "漢字", "🌿👩‍👩‍👧", '\\n\\"\\u00e9\\ud83c\\udf3f', "a b", "\\t\\\\"])
def test_a_character_may_be_spread_over_ids_and_is_whole_in_the_end(words: Words, text: str) -> None:
    guide = words.guide({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
    document = f'{{"a":"{text}"}}'
    heard = Detokeniser(words.table)
    said = ""
    for token in words.bytewise(document):
        allowed = guide.allowed()
        assert allowed[token]
        assert not allowed[list(words.closing)].any()
        guide.push(token)
        said += heard.push(token)
    assert said == document
    assert guide.allowed()[list(words.closing)].all()


def test_half_a_character_cannot_be_followed_by_something_else(words: Words) -> None:
    guide = words.guide({"type": "string"})
    for token in words.bytewise('"')[:1] + words.bytewise("漢")[:2]:
        guide.push(token)
    said = [words.table[token] for token in np.flatnonzero(guide.allowed())]
    assert said
    assert all(0x80 <= spelt[0] < 0xC0 for spelt in said)


@pytest.mark.parametrize(
    "so_far", ["", '{"', '{"title":"a', '{"title":"a","code":"AB', '{"title":"a\\', '{"title":"漢']
)
def test_what_is_allowed_is_exactly_what_can_be_pushed(words: Words, so_far: str) -> None:
    def arrived() -> Guide:
        guide = words.guide(Drawing.model_json_schema())
        for token in words.bytewise(so_far):
            guide.push(token)
        return guide

    allowed = arrived().allowed()
    draw = random.Random(len(so_far))
    tried = draw.sample(range(words.size), min(words.size, 120)) + draw.choices(np.flatnonzero(allowed).tolist(), k=40)
    for token in tried:
        guide = arrived()
        guide.push(token)
        assert guide.holds == allowed[token], words.table[token]


def test_ids_without_text_and_ids_beyond_the_tokenizer_are_never_allowed(words: Words) -> None:
    silent = [token for token in range(words.size) if not words.table[token] and token not in words.closing]
    guide = words.guide({"type": "string"})
    for token in words.bytewise('"a"'):
        allowed = guide.allowed()
        assert allowed.shape == (words.size,)
        assert not allowed[silent].any()
        guide.push(token)
    assert not guide.allowed()[silent].any()


def test_after_a_document_that_cannot_go_on_only_closing_ids_are_allowed(words: Words) -> None:
    guide = words.grammars.guide({"type": "json_object"})
    for token in words.bytewise('{"a":1}'):
        guide.push(token)
    assert frozenset(np.flatnonzero(guide.allowed()).tolist()) == words.closing


def test_a_number_may_end_or_go_on(words: Words) -> None:
    guide = words.guide({"type": "integer"})
    guide.push(words.id_of[b"4"])
    allowed = guide.allowed()
    assert allowed[list(words.closing)].all()
    assert allowed[words.id_of[b"2"]]
    guide.push(min(words.closing))
    assert guide.holds


def test_there_is_no_whitespace_between_the_parts(words: Words) -> None:
    guide = words.guide({"type": "array", "items": {"type": "integer"}, "x-guidance": {"whitespace_flexible": True}})
    for token in words.bytewise("[1,"):
        said = [words.table[token] for token in np.flatnonzero(guide.allowed())]
        assert not any(b" " in spelt or b"\n" in spelt for spelt in said)
        guide.push(token)


@pytest.mark.parametrize("asked", [False, True], ids=["unasked", "asked on the way"])
def test_a_guide_is_rebuilt_by_pushing_the_same_ids(words: Words, asked: bool) -> None:
    schema = Drawing.model_json_schema()
    ids = walk(words, words.guide(schema), seed=3)
    first, second = words.guide(schema), words.guide(schema)
    for token in ids:
        assert first.allowed().any()
        first.push(token)
        if asked:
            assert second.allowed().any()
        second.push(token)
    assert np.array_equal(first.allowed(), second.allowed())
    for cut in range(0, len(ids), 7):
        again = words.guide(schema)
        for token in ids[:cut]:
            again.push(token)
        assert again.allowed()[ids[cut]]


@pytest.mark.parametrize("foreign", ["not allowed", "closing too early", "without text", "beyond the tokenizer"])
def test_an_id_that_is_not_allowed_makes_the_guide_let_go(smollm2: Words, foreign: str) -> None:
    guide = smollm2.grammars.guide({"type": "json_object"})
    guide.push(smollm2.id_of[b"{"])
    token = {
        "not allowed": smollm2.id_of[b"a"],
        "closing too early": min(smollm2.closing),
        "without text": smollm2.table.index(b"", max(smollm2.closing) + 1),
        "beyond the tokenizer": smollm2.size + 5,
    }[foreign]
    guide.push(token)
    assert not guide.holds
    assert guide.allowed().all()
    guide.push(smollm2.id_of[b"}"])
    assert guide.allowed().shape == (smollm2.size,)
    assert guide.allowed().all()


def test_streams_with_the_same_schema_do_not_disturb_each_other(smollm2: Words) -> None:
    first, second = (smollm2.grammars.guide({"type": "json_object"}) for _ in range(2))
    before = second.allowed()
    for token in smollm2.bytewise('{"a"'):
        first.push(token)
    assert np.array_equal(second.allowed(), before)
    assert not np.array_equal(first.allowed(), before)
    assert np.array_equal(smollm2.grammars.guide({"type": "json_object"}).allowed(), before)


def test_what_is_kept_is_bounded_and_compiled_once(smollm2: Words) -> None:
    schemas = [{"const": f"text {index}"} for index in range(3 * MAX_KEPT)]
    for schema in schemas:
        assert smollm2.guide(schema).allowed().any()
    kept = smollm2.grammars.kept
    assert kept == MAX_KEPT
    compiled = smollm2.grammars.compiled
    for schema in [*schemas[-MAX_KEPT:], *schemas[-3:]]:
        smollm2.guide(schema)
    assert smollm2.grammars.compiled == compiled
    for _ in range(2):
        with pytest.raises(UnsupportedFormat, match="cannot be enforced"):
            smollm2.guide({"not": {}})
    assert smollm2.grammars.compiled == compiled + 1


def objects(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def fields(count: int, required: bool) -> dict[str, Any]:
    names = [f"field {index}" for index in range(count)]
    return {"type": "object", "properties": {name: {} for name in names}, "required": names if required else []}


def pattern(text: str) -> dict[str, Any]:
    return {"type": "string", "pattern": text}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown keyword": ({"type": "array", "uniqueItems": True}, 'the schema\'s "uniqueItems" cannot be enforced'),
    "condition": ({"if": {}, "then": {}}, 'the schema\'s "if", "then" cannot be enforced'),
    "oneOf": ({"oneOf": [{"type": "object"}, {"minProperties": 1}]}, "oneOf whose cases may not exclude each other"),
    "lenient": ({"properties": {"a": {"not": {}}}, "x-guidance": {"lenient": True}}, '"not" cannot be enforced'),
    "web": ({"$ref": "http://127.0.0.1:9/s.json"}, "'http://127.0.0.1:9/s.json' lies outside the schema"),
    "file": ({"$ref": "file:///etc/passwd"}, "'file:///etc/passwd' lies outside the schema and is not fetched"),
    "nowhere": ({"$ref": "#/$defs/none"}, "Pointer '/$defs/none' does not exist"),
    "itself": ({"$ref": "#"}, "there is no document that satisfies the schema"),
    "nothing": ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum (5) is greater than maximum (1)"),
    "format": ({"type": "string", "format": "nope"}, "Unknown format: nope"),
    "type": ({"type": "blob"}, "Invalid type: blob"),
    "shape": ({"properties": [1]}, "properties must be an object"),
    "not JSON": ({"const": "\ud800"}, "the schema is not JSON"),
    "look-ahead": (pattern("^(?=a)b"), "the pattern ^(?=a)b cannot be followed: look-around"),
    "no pattern": (pattern("(["), "the pattern ([ cannot be followed: unclosed character class"),
    "reference": (pattern(r"(a)\1"), r"the pattern (a)\1 cannot be followed: backreferences are not supported"),
    "entangled": (
        {"allOf": [pattern(f".*{letter}.{{{at + 5}}}$") for at, letter in enumerate("abcdefghijkl")]},
        "the schema's strings are too entangled",
    ),
    "split name": ({"type": "string", "pattern": {"x" + "ü" * 99: 1}}, "too large or too entangled"),
    "1 MiB": ({"description": "x" * 2**20}, "bytes, more than 131072"),
    "deep": (objects(60), "nests more than 100 levels deep"),
    "very deep": (objects(2_000), "nests more than 100 levels deep"),
    "wide": (fields(1_001, required=True), "the schema has 1001 properties, more than 1000"),
    "optional": (fields(401, required=False), "401 of the schema's properties are not `required`, more than 400"),
    "product": (
        {"allOf": [{"anyOf": [fields(1, True) | {"title": f"{i}{j}"} for i in range(30)]} for j in range(12)]},
        "schema too large",
    ),
    "multiple": ({"type": "integer", "multipleOf": 104_729}, "`multipleOf` have a product of more than 10000"),
    "multiples": ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 99.67}]}, "`multipleOf` have a product of more"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_refused_in_one_sentence_that_names_it(smollm2: Words, name: str) -> None:
    schema, words_of_it = REFUSED[name]
    with pytest.raises(UnsupportedFormat) as refusal:
        smollm2.guide(schema)
    assert words_of_it in refusal.value.message
    assert "\n" not in refusal.value.message
    assert "llguidance" not in refusal.value.message
    assert len(refusal.value.message) < 400
    assert (refusal.value.code, refusal.value.param) == ("unsupported_parameter", "text.format")


@pytest.mark.parametrize(
    "asked", [{"type": "json_schema"}, {"type": "json_schema", "schema": True}, {"type": "grammar"}, {}]
)
def test_a_format_that_is_none_of_the_two_is_refused(smollm2: Words, asked: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFormat, match=r"^`text.format` cannot be held: "):
        smollm2.grammars.guide(asked)


@pytest.mark.parametrize(
    "schema",
    [
        pattern("^(a+)+$"),
        pattern("^(a|b)*a(a|b){20}$"),
        pattern("^((((x{1,99}){1,99}){1,99}){1,99})$"),
        {"type": "string", "minLength": 10**6},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
        {"enum": [f"value number {index}" for index in range(5_000)]},
        {"type": "integer", "multipleOf": 9_973},
        fields(1_000, required=True),
        fields(400, required=False),
        objects(48),
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_what_looks_hostile_and_can_be_held_is_held(smollm2: Words, schema: dict[str, Any]) -> None:
    guide = smollm2.guide(schema)
    draw = random.Random(1)
    for _ in range(30):
        token = draw.choice(np.flatnonzero(guide.allowed()).tolist())
        if token in smollm2.closing:
            break
        guide.push(token)
    assert guide.holds


def test_a_schema_that_is_too_entangled_on_the_way_ends_with_a_refusal(smollm2: Words) -> None:
    guide = smollm2.guide({"type": "object", "properties": {"a": pattern("^(.{1,1000}){1,1000}$")}, "required": ["a"]})
    for token in smollm2.bytewise('{"a":"xyz'):
        guide.push(token)
    with pytest.raises(UnsupportedFormat, match="strings are too entangled"):
        guide.allowed()
    guide.push(smollm2.id_of[b"a"])
    assert guide.holds


def test_a_release_without_a_closing_id_or_a_readable_tokenizer_is_refused(smollm2_release: Path) -> None:
    manifest = decode_manifest((smollm2_release / "manifest.json").read_bytes(), "manifest.json")
    with pytest.raises(ReleaseError, match="names no id that ends an answer"):
        Grammars([b"a"], 1, frozenset({7}))
    with pytest.raises(ReleaseError, match="is not a tokenizer"):
        Grammars.open(manifest, "[]", frozenset({0}))
