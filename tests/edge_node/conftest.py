"""The small real model, for tests that run it in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.manifest import MANIFEST_NAME, Manifest, decode_manifest
from edge_node.engine.speech import Speech, open_speech


@pytest.fixture(scope="module")
def manifest(smollm2_release: Path) -> Manifest:
    return decode_manifest((smollm2_release / MANIFEST_NAME).read_bytes(), "the test's release")


@pytest.fixture(scope="module")
def speech(smollm2_release: Path, manifest: Manifest) -> Speech:
    return open_speech(manifest, lambda name: (smollm2_release / name).read_text())
