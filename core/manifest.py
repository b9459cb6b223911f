"""`manifest.json`: what a release folder contains and what a node may assume about it.

Does not know how files are read or hashed (export writes, `edge_node/release/model_store` checks).
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from core.errors import ReleaseError

MANIFEST_NAME = "manifest.json"
FORMAT = 1
GRAPH_ABI = 1

_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RELEASE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}@[0-9a-f]{12}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ReleaseFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a release; `path` is relative to the folder and never leaves it."""

    path: str
    size_bytes: int
    sha256: str


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint that a release was made from."""

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


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One variant of one release.

    release: `<model>@<12 hex>`, a digest over source weights, tokenizer, template and maximum
    context: equal for every variant of the same model. variant: the recipe's name.
    context_tokens: the most positions the graph's rotary tables hold.
    vocab_size: width of `logits`; tokenizer_size: ids that the tokenizer knows (the rest is
    padding, masked by every sampler). stop_ids: the end-of-sequence id first. bos_id: what a chat
    template calls bos_token; nothing else puts it before a prompt.
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
    speech: Literal["chat_template"]
    graph: str
    tokenizer: str
    chat_template: str
    files: list[ReleaseFile]
    claims: dict[str, str]


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
        if not _SHA256.fullmatch(file.sha256) or file.size_bytes < 0:
            raise ReleaseError(f"{where} lists {file.path!r} without a proper sha256 and size.")
    named = {file.path for file in manifest.files}
    for needed in (manifest.graph, manifest.tokenizer, manifest.chat_template):
        if needed not in named:
            raise ReleaseError(f"{where} does not list its own file {needed!r}; export the model again.")
    return manifest
