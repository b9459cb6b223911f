"""Checkpoints and releases that the exporter's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export.tiny_gguf import TinyLlama


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole, tiny checkpoint."""
    return TinyLlama().write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
