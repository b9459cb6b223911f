"""`manifest.json`: what a release folder contains and what a node may assume about it.

Does not know how files are read or hashed (export writes, `edge_node/release/model_store` checks).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import msgspec

from core.errors import ReleaseError

MANIFEST_NAME = "manifest.json"
FORMAT = 2
GRAPH_ABI = 1
CHUNK_BYTES = 8 * 1024 * 1024
CONTEXT_TOKENS_MAX = 2**31
"""Lengths of sequences are 32-bit numbers in the graph."""

_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RELEASE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}@[0-9a-f]{12}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_INT64_MAX = 2**63 - 1


class Chunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A run of at most CHUNK_BYTES of a file and their digest: the unit of checking and of delta transfer."""

    size_bytes: int
    sha256: str


class ReleaseFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a release; `path` is relative to the folder and never leaves it.

    `chunks` cover the file without gaps, in order. Chunks of the data file end where a tensor ends, so that an
    unchanged tensor keeps its chunks whatever grew or shrank before it.
    """

    path: str
    size_bytes: int
    chunks: list[Chunk]


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint that a release was made from; sha256 is over its tensors' bytes, whatever files they lay in."""

    name: str
    sha256: str
    architecture: str


class KvShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape of the KV cache: per layer a key and a value of [batch, kv_heads, capacity, head_dim]."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: Literal["float32", "float16"]

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * (4 if self.dtype == "float32" else 2)


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt and the ids that this variant continues it with, greedily.

    min_margin: the smallest distance between the two best logits on the way; a processor of another kind may differ
    where it is small. made_by: ONNX Runtime and processor that generated it.
    """

    prompt_ids: list[int]
    ids: list[int]
    min_margin: float
    made_by: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One variant of one release.

    release: `<model>@<12 hex>`, a digest over source weights, tokenizer, template and maximum
    context: equal for every variant of the same model. variant: the recipe's name.
    context_tokens: the most positions the graph's rotary tables hold.
    vocab_size: width of `logits`; tokenizer_size: ids that the tokenizer knows (the rest is
    padding, masked by every sampler). stop_ids: the end-of-sequence id first. bos_id: what a chat
    template calls bos_token; nothing else puts it before a prompt. speech: who renders and parses,
    `chat_template` (then that file is named) or the `harmony` format.
    device: what the graph was laid out for. operators: those that ONNX Runtime itself does not
    have, `<domain>.<name>`; a node needs their library. golden: empty where the exporting machine
    could not run the graph. quality: the report file, if there is one.
    batch_invariant: a row's logits do not depend on the other rows of its batch
    (docs/ARCHITECTURE.md, determinism); measured by the exporter on the machine that exported.
    """

    format: int
    graph_abi: int
    model: str
    release: str
    variant: str
    family: str
    exporter_version: str
    source: Source
    context_tokens: int
    vocab_size: int
    tokenizer_size: int
    kv: KvShape
    stop_ids: list[int]
    bos_id: int | None
    batch_invariant: bool
    device: Literal["cpu", "cuda"]
    operators: list[str]
    speech: Literal["chat_template", "harmony"]
    graph: str
    tokenizer: str
    chat_template: str | None
    quality: str | None
    files: list[ReleaseFile]
    claims: dict[str, str]
    golden: list[Golden]


def release_name(model: str, digest_hex: str) -> str:
    """`<model>@<first 12 hex digits>`; raises ReleaseError for a name outside [a-z0-9._-]."""
    if not _MODEL.fullmatch(model):
        raise ReleaseError(f"The model name {model!r} may hold only a-z, 0-9, '.', '_' and '-', at most 64 of them.")
    return f"{model}@{digest_hex[:12]}"


def model_of(release: str) -> str:
    """The alias that clients name, out of a release id."""
    return release.split("@", 1)[0]


def encode_manifest(manifest: Manifest) -> bytes:
    """Stable, human-readable JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Parse and check; raises ReleaseError naming `where` and what to do."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ReleaseError(
            f"{where} is not a manifest this version can read ({error}); export the model again."
        ) from error
    if (manifest.format, manifest.graph_abi) != (FORMAT, GRAPH_ABI):
        raise ReleaseError(
            f"{where} has format {manifest.format} and graph ABI {manifest.graph_abi}, this version reads "
            f"{FORMAT} and {GRAPH_ABI}; export the model again."
        )
    if not _RELEASE.fullmatch(manifest.release) or model_of(manifest.release) != manifest.model:
        raise ReleaseError(f"{where} names the release {manifest.release!r}, which is not <model>@<12 hex digits>.")
    for file in manifest.files:
        if file.path.startswith("/") or "\\" in file.path or ".." in file.path.split("/"):
            raise ReleaseError(
                f"{where} lists {file.path!r}, which leaves the release folder; do not use this release."
            )
        _check_chunks(file, where)
    named = {file.path for file in manifest.files}
    for needed in (manifest.graph, manifest.tokenizer, manifest.chat_template, manifest.quality):
        if needed is not None and needed not in named:
            raise ReleaseError(f"{where} does not list its own file {needed!r}; export the model again.")
    if manifest.speech == "chat_template" and manifest.chat_template is None:
        raise ReleaseError(f"{where} speaks by a chat template but names none; export the model again.")
    for name, value, least, most in _numbers(manifest):
        if not least <= value <= most:
            limit = f"between {least} and {most}" if most < _INT64_MAX else f"{least} or more"
            raise ReleaseError(f"{where} says that {name} is {value}, which must be {limit}; export the model again.")
    return manifest


def _numbers(manifest: Manifest) -> Iterator[tuple[str, int, int, int]]:
    """(name, value, least, most) of every number that a node computes with; a bound stands before those it bounds."""
    yield "vocab_size", manifest.vocab_size, 1, _INT64_MAX
    yield "tokenizer_size", manifest.tokenizer_size, 1, manifest.vocab_size
    yield "context_tokens", manifest.context_tokens, 2, CONTEXT_TOKENS_MAX
    yield "kv.layers", manifest.kv.layers, 1, _INT64_MAX
    yield "kv.kv_heads", manifest.kv.kv_heads, 1, _INT64_MAX
    yield "kv.head_dim", manifest.kv.head_dim, 1, _INT64_MAX
    last_id = manifest.tokenizer_size - 1
    yield "the number of stop_ids", len(manifest.stop_ids), 1, manifest.tokenizer_size
    for token in manifest.stop_ids:
        yield "one of stop_ids", token, 0, last_id
    if manifest.bos_id is not None:
        yield "bos_id", manifest.bos_id, 0, last_id
    for number, golden in enumerate(manifest.golden):
        name = f"golden[{number}]"
        yield f"the length of {name}.prompt_ids", len(golden.prompt_ids), 1, manifest.context_tokens - 1
        yield f"the length of {name}.ids", len(golden.ids), 1, manifest.context_tokens - len(golden.prompt_ids)
        for token in golden.prompt_ids:
            yield f"one of {name}.prompt_ids", token, 0, manifest.vocab_size - 1
        for token in golden.ids:
            yield f"one of {name}.ids", token, 0, last_id


def _check_chunks(file: ReleaseFile, where: str) -> None:
    proper = all(0 < chunk.size_bytes <= CHUNK_BYTES and _SHA256.fullmatch(chunk.sha256) for chunk in file.chunks)
    if not proper or sum(chunk.size_bytes for chunk in file.chunks) != file.size_bytes:
        raise ReleaseError(
            f"{where} lists {file.path!r} without a proper sha256 for each of its bytes; export or copy it again."
        )
