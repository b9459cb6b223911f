from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from core.errors import ReleaseError
from core.manifest import (
    CHUNK_BYTES,
    Chunk,
    Golden,
    KvShape,
    Manifest,
    ReleaseFile,
    Source,
    decode_manifest,
    encode_manifest,
    model_of,
    release_name,
)

SHA = "ab" * 32
MANIFEST = Manifest(
    format=2,
    graph_abi=1,
    model="m",
    release="m@0123456789ab",
    variant="cpu-int8",
    family="llama",
    exporter_version="0.1.0",
    source=Source("m.gguf", SHA, "llama"),
    context_tokens=2048,
    vocab_size=100,
    tokenizer_size=99,
    kv=KvShape(2, 3, 4, "float32"),
    stop_ids=[2],
    bos_id=None,
    batch_invariant=True,
    device="cpu",
    operators=[],
    speech="chat_template",
    graph="model.onnx",
    tokenizer="tokenizer.json",
    chat_template="chat_template.jinja",
    quality=None,
    files=[
        ReleaseFile(path, 1, [Chunk(1, SHA)])
        for path in ("model.onnx", "tokenizer.json", "chat_template.jinja", "d/w.data")
    ],
    claims={"kl": "0.01"},
    golden=[],
)


def changed(**fields: Any) -> bytes:
    """The manifest's JSON with top-level fields replaced, None = left out."""
    tree = json.loads(encode_manifest(MANIFEST)) | fields
    return json.dumps({key: value for key, value in tree.items() if value != "left out"}).encode()


def file(path: str = "extra", size_bytes: int = 1, chunks: Sequence[tuple[int, str]] = ((1, SHA),)) -> dict[str, Any]:
    listed = json.loads(encode_manifest(MANIFEST))["files"]
    return {"files": [*listed, {"path": path, "size_bytes": size_bytes, "chunks": chunks}]}


def test_a_manifest_is_written_and_read_back() -> None:
    assert decode_manifest(encode_manifest(MANIFEST), "here") == MANIFEST


def test_a_model_that_speaks_harmony_has_no_chat_template() -> None:
    manifest = decode_manifest(changed(speech="harmony", chat_template=None), "here")
    assert manifest.chat_template is None


def test_the_same_manifest_is_written_as_the_same_bytes() -> None:
    assert encode_manifest(MANIFEST) == encode_manifest(decode_manifest(encode_manifest(MANIFEST), "here"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a manifest"),
        (b"\xff", "not a manifest"),
        (encode_manifest(MANIFEST).replace(b'"llama"', b'"\xff"'), "not a manifest"),
        (b'{"claims":' * 50_000, "not a manifest"),
        (changed(model="left out"), "`model`"),
        (changed(surprise=1), "`surprise`"),
        (changed(vocab_size="many"), "vocab_size"),
        (changed(format=1), "has format 1 and graph ABI 1, this version reads 2 and 1"),
        (changed(graph_abi=9), "graph ABI 9"),
        (changed(release="m@0123"), "not <model>@<12 hex digits>"),
        (changed(release="other@0123456789ab"), "not <model>@<12 hex digits>"),
        (changed(release="m@0123456789ab\n"), "not <model>@<12 hex digits>"),
        (changed(graph="missing.onnx"), "does not list its own file 'missing.onnx'"),
        (changed(tokenizer="missing.json"), "does not list its own file 'missing.json'"),
        (changed(chat_template="missing.jinja"), "does not list its own file 'missing.jinja'"),
        (changed(**file("/etc/passwd")), "leaves the release folder"),
        (changed(**file("../secret")), "leaves the release folder"),
        (changed(**file("a/../../secret")), "leaves the release folder"),
        (changed(**file("a\\..\\b")), "leaves the release folder"),
        (changed(chat_template=None), "names none"),
        (changed(quality="missing.json"), "does not list its own file 'missing.json'"),
        (changed(**file(chunks=[(1, "ab")])), "without a proper sha256"),
        (changed(**file(chunks=[(1, "AB" * 32)])), "without a proper sha256"),
        (changed(**file(size_bytes=3)), "without a proper sha256 for each of its bytes"),
        (changed(**file(size_bytes=CHUNK_BYTES + 1, chunks=[(CHUNK_BYTES + 1, SHA)])), "without a proper sha256"),
        (changed(**file(size_bytes=0, chunks=[(1, SHA), (-1, SHA)])), "without a proper sha256"),
    ],
)
def test_what_is_no_release_of_ours_is_refused_with_the_place_and_the_reason(data: bytes, words: str) -> None:
    with pytest.raises(ReleaseError) as refused:
        decode_manifest(data, "releases/m/manifest.json")
    assert words in refused.value.message
    assert refused.value.message.startswith("releases/m/manifest.json")
    assert refused.value.message.endswith(".")


def kv(**fields: int) -> dict[str, Any]:
    return {"kv": json.loads(encode_manifest(MANIFEST))["kv"] | fields}


def golden(prompt_ids: Sequence[int], ids: Sequence[int]) -> dict[str, Any]:
    return {"golden": [{"prompt_ids": prompt_ids, "ids": ids, "min_margin": 0.5, "made_by": "a test"}]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 2**63}, "vocab_size is 9223372036854775808"),
        ({"tokenizer_size": 0}, "tokenizer_size is 0, which must be between 1 and 100"),
        ({"tokenizer_size": 101}, "tokenizer_size is 101"),
        ({"context_tokens": 1}, "context_tokens is 1"),
        ({"context_tokens": 2**31 + 1}, "context_tokens is 2147483649"),
        (kv(layers=0), "kv.layers is 0, which must be 1 or more"),
        (kv(kv_heads=-1), "kv.kv_heads is -1"),
        (kv(head_dim=0), "kv.head_dim is 0"),
        ({"stop_ids": []}, "the number of stop_ids is 0"),
        ({"stop_ids": [2, -1]}, "one of stop_ids is -1"),
        ({"stop_ids": [99]}, "one of stop_ids is 99, which must be between 0 and 98"),
        ({"bos_id": -1}, "bos_id is -1"),
        ({"bos_id": 99}, "bos_id is 99"),
        (golden([], [1]), "the length of golden[0].prompt_ids is 0"),
        (golden([1], []), "the length of golden[0].ids is 0"),
        (golden([1] * 2000, [1] * 49), "the length of golden[0].ids is 49, which must be between 1 and 48"),
        (golden([-1], [1]), "one of golden[0].prompt_ids is -1"),
        (golden([100], [1]), "one of golden[0].prompt_ids is 100"),
        (golden([1], [99]), "one of golden[0].ids is 99"),
    ],
)
def test_a_number_that_no_model_has_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ReleaseError) as refused:
        decode_manifest(changed(**fields), "here")
    assert words in refused.value.message
    assert refused.value.message.startswith("here")


def test_numbers_at_their_bounds_are_read() -> None:
    golden = Golden([99] * 2000, [98] * 48, 0.0, "a test")
    manifest = msgspec.structs.replace(MANIFEST, stop_ids=[0, 98], bos_id=98, golden=[golden])
    assert decode_manifest(encode_manifest(manifest), "here") == manifest


def test_a_release_is_named_after_its_model_and_digest() -> None:
    assert release_name("smollm2-135m", "0123456789abcdef") == "smollm2-135m@0123456789ab"
    assert model_of("smollm2-135m@0123456789ab") == "smollm2-135m"


@pytest.mark.parametrize("model", ["", "Upper", "with space", "a@b", "-a", "a/b", "a" * 65, "a\n"])
def test_a_model_name_that_would_not_fit_a_path_or_url_is_refused(model: str) -> None:
    with pytest.raises(ReleaseError, match="may hold only"):
        release_name(model, "0" * 64)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2)])
def test_the_cache_of_a_token_is_a_key_and_a_value_per_layer_and_head(dtype: Any, width: int) -> None:
    assert KvShape(2, 3, 4, dtype).bytes_per_token == 2 * (2 * 3 * 4) * width
