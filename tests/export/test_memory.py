"""The promise that the first user relies on: a checkpoint far larger than memory is exported in less than 2 GiB."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from export.recipes import Recipe
from tests.tools.gpt_oss_checkpoint import FULL, write_checkpoint

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
    command = [sys.executable, "-m", "export", str(two_layers), "--recipe", recipe, "--out", str(out), "--no-run"]
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert (out / "manifest.json").is_file()
    peak_mib = used.ru_maxrss / 1024
    print(f"\n{recipe}: peak RSS {peak_mib:.0f} MiB")
    assert peak_mib < CEILING_MIB
    for path in out.iterdir():
        path.unlink()  # gigabytes: the next recipe needs the room
