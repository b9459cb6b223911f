"""Open a release folder and make sure that it is what its manifest claims.

Does not know what the files mean: graph, tokenizer and template are the engine's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from core.errors import ReleaseError
from core.manifest import MANIFEST_NAME, Chunk, Manifest, ReleaseFile, decode_manifest


@dataclass(frozen=True, slots=True)
class Release:
    """A folder whose files are present and of the right size."""

    folder: Path
    manifest: Manifest

    def read_text(self, path: str) -> str:
        """A text file of the release; raises ReleaseError."""
        try:
            return (self.folder / path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ReleaseError(f"{self.folder / path} cannot be read ({error}); export the model again.") from error


def open_release(folder: Path) -> Release:
    """Read the manifest, check that every file is there with its size; raises ReleaseError."""
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ReleaseError(
            f"There is no release in {str(folder)!r} (no {MANIFEST_NAME}); export a model with `python -m export` "
            "or set node.release to its folder."
        ) from error
    except OSError as error:
        raise ReleaseError(f"{path} cannot be read: {error.strerror}.") from error
    manifest = decode_manifest(data, str(path))
    for file in manifest.files:
        _check_size(folder, file)
    return Release(folder, manifest)


def verify(release: Release) -> None:
    """Compare every chunk with the manifest's sha256; raises ReleaseError naming the first that differs."""
    for file in release.manifest.files:
        path = release.folder / file.path
        try:
            with path.open("rb") as stream:
                for chunk in file.chunks:
                    _check_chunk(stream, chunk, path)
        except OSError as error:
            raise ReleaseError(f"{path} cannot be read: {error.strerror}.") from error


def _check_chunk(stream: BinaryIO, chunk: Chunk, path: Path) -> None:
    start = stream.tell()
    if hashlib.sha256(stream.read(chunk.size_bytes)).hexdigest() != chunk.sha256:
        raise ReleaseError(
            f"{path} is damaged after byte {start} (not the manifest's sha256); export or copy the release again."
        )


def _check_size(folder: Path, file: ReleaseFile) -> None:
    path = folder / file.path
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise ReleaseError(f"{path} is missing from the release; export or copy the release again.") from error
    if size_bytes != file.size_bytes:
        raise ReleaseError(
            f"{path} has {size_bytes} bytes, the manifest says {file.size_bytes}; export or copy the release again."
        )
