"""Nodes with a gpt-oss whose weights are noise and whose sampler follows a script (tests/tools/harmony_script)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from export.build import Order, export
from export.recipes import Recipe
from tests.e2e.processes import ROOT, Node
from tests.tools.gpt_oss_checkpoint import GptOssShape, write_checkpoint

MODEL = "gpt-oss"


class ScriptedNode(Node):
    """A node whose sampler follows the script."""

    def argv(self) -> Sequence[str]:
        return [sys.executable, "-m", "tests.tools.scripted_node", "--config", "configs/edge.toml"]

    def resident_tokens(self, key: str) -> int:
        """How much of the prefix with this key its engine has, as it told the node last."""
        told = [line.split() for line in self.log().splitlines() if line.startswith(f"resident {key} ")]
        return int(told[-1][2]) if told else 0


def tokenizer_json() -> Path:
    script = [sys.executable, "scripts/get-tokenizer"]
    return ROOT / subprocess.run(script, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def write_release(folder: Path, shape: GptOssShape, recipe: Recipe) -> Path:
    checkpoint = folder / "checkpoint"
    write_checkpoint(checkpoint, shape, tokenizer="gpt-oss", genuine_tokenizer=tokenizer_json())
    export(Order(str(checkpoint), folder / MODEL, MODEL, recipe, run=False))
    for path in checkpoint.iterdir():
        path.unlink()  # gigabytes of it
    return folder / MODEL
