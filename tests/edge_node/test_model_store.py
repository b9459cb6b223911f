from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest

from core.errors import ReleaseError
from core.manifest import MANIFEST_NAME, Chunk, ReleaseFile, encode_manifest
from edge_node.release.model_store import open_release, verify
from tests.edge_node.fake_engine import MANIFEST

CONTENT = {"model.onnx": b"graph", "tokenizer.json": b"{}", "chat_template.jinja": "héllo".encode()}


def chunks(data: bytes) -> list[Chunk]:
    """Of three bytes, the last one shorter."""
    pieces = [data[start : start + 3] for start in range(0, len(data), 3)]
    return [Chunk(len(piece), hashlib.sha256(piece).hexdigest()) for piece in pieces]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A release whose files are what its manifest says."""
    files = [ReleaseFile(path, len(data), chunks(data)) for path, data in CONTENT.items()]
    for path, data in CONTENT.items():
        (tmp_path / path).write_bytes(data)
    (tmp_path / MANIFEST_NAME).write_bytes(encode_manifest(msgspec.structs.replace(MANIFEST, files=files)))
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(ReleaseError) as caught:
        verify(open_release(folder))
    return caught.value.message


def test_a_release_that_is_what_it_claims_opens(folder: Path) -> None:
    release = open_release(folder)
    verify(release)
    assert release.manifest.release == MANIFEST.release
    assert release.read_text("chat_template.jinja") == "héllo"


def test_a_folder_without_a_manifest_is_no_release(tmp_path: Path) -> None:
    sentence = refusal(tmp_path / "nowhere")
    assert "nowhere" in sentence
    assert "python -m export" in sentence


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(folder)


def test_a_truncated_file_is_named_with_both_sizes(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"grap")
    assert "model.onnx has 4 bytes, the manifest says 5" in refusal(folder)


def test_a_damaged_file_of_the_right_size_is_found_by_its_hash(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"grapH")
    open_release(folder)
    assert "model.onnx is damaged after byte 3" in refusal(folder)


def test_a_damaged_manifest_is_named(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_bytes(b"{")
    assert MANIFEST_NAME in refusal(folder)


def test_text_that_is_not_utf_8_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe....")
    release = open_release(folder)
    with pytest.raises(ReleaseError, match="cannot be read"):
        release.read_text("chat_template.jinja")
