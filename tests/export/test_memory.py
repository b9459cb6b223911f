"""The promise that the first user relies on: a checkpoint far larger than memory is exported in less than 2 GiB."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from export.recipes import Recipe
from tests.tools.gpt_oss_checkpoint import FULL, write_checkpoint
from tests.tools.peak_rss import run_measured

CEILING_MIB = 2048
RECIPES = [recipe for recipe in Recipe if recipe.value.startswith(("cpu-", "cuda-"))]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-OSS-20B's real widths and its whole vocabulary; more layers would only take longer."""
    return write_checkpoint(tmp_path_factory.mktemp("full") / "gpt-oss", replace(FULL, layers=2), tokenizer="tiny")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_full_width_is_exported_in_two_gibibytes(tmp_path: Path, two_layers: Path, recipe: Recipe) -> None:
    out = tmp_path / "release"
    arguments = [str(two_layers), "--recipe", recipe, "--out", str(out), "--no-run"]
    peak_mib = run_measured("export", arguments)
    assert (out / "manifest.json").is_file()
    print(f"\n{recipe}: peak RSS {peak_mib:.0f} MiB")
    assert peak_mib < CEILING_MIB
    for path in out.iterdir():
        path.unlink()  # gigabytes: the next recipe needs the room
