from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from export.errors import SourceError
from export.sources.checkpoint import Extent
from export.sources.digest import PIECE_BYTES, SourceDigest, root_digest, tensor_digest
from export.sources.opening import open_checkpoint
from export.spec import Kind, TensorInfo


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_a_tensor_s_digest_is_that_of_its_pieces_digests(tmp_path: Path) -> None:
    first, second = bytes(range(256)) * 40_000, b"scales"
    (tmp_path / "a").write_bytes(b"header" + first)
    (tmp_path / "b").write_bytes(second + b"trailer")
    extents = [Extent(tmp_path / "a", 6, len(first)), Extent(tmp_path / "b", 0, len(second))]
    pieces = [first[:PIECE_BYTES], first[PIECE_BYTES:], second]
    assert tensor_digest(extents) == hashlib.sha256(b"".join(map(sha256, pieces))).hexdigest()


def test_names_kinds_shapes_and_bytes_all_count_and_their_order_does_not() -> None:
    tensors = {"a": TensorInfo("a", (2, 3), Kind.BF16), "b": TensorInfo("b", (3,), Kind.F32)}
    digests = {"a": "00", "b": "01"}
    root = root_digest(tensors, digests)
    assert root_digest(dict(reversed(tensors.items())), digests) == root
    others = [
        root_digest(tensors, {"a": "00", "b": "02"}),
        root_digest(tensors, {"a": "01", "b": "00"}),
        root_digest(tensors | {"a": replace(tensors["a"], shape=(3, 2))}, digests),
        root_digest(tensors | {"a": replace(tensors["a"], kind=Kind.F16)}, digests),
        root_digest({"a": tensors["a"]}, digests),
    ]
    assert len({root, *others}) == 6


def test_digests_that_are_known_already_are_not_made_again(tiny_gguf: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_gguf))
    with SourceDigest(checkpoint) as digest:
        root = digest.root()
        known = {name: digest.of(name) for name in checkpoint.tensors}
    changed = next(iter(known))
    with SourceDigest(checkpoint, known) as digest:
        assert digest.root() == root
    with SourceDigest(checkpoint, known | {changed: "0" * 64}) as digest:
        assert digest.root() != root


def test_a_source_that_shrinks_or_goes_away_meanwhile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"short")
    with pytest.raises(SourceError, match=r"model\.safetensors became shorter"):
        tensor_digest([Extent(path, 0, 8)])
    path.unlink()
    with pytest.raises(SourceError, match=r"model\.safetensors cannot be read"):
        tensor_digest([Extent(path, 0, 8)])
