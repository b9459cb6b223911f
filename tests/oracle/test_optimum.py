"""Our fp32 graphs against optimum's export of the same checkpoint: two exporters that share no line, no operator.

optimum runs in the environment of `make oracle`, through optimum_logits.py.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from core.manifest import MANIFEST_NAME, decode_manifest
from export.forms.values import Doubles
from tests.export.graph_runner import logits_of
from tests.oracle.environments import ROOT, interpreter, offline
from tests.tools.gpt_oss_checkpoint import TINY, write_checkpoint

PROSE = """\
The tide table on the harbour wall said low water at eleven, so we left the boat on the sand and walked out to the
lighthouse. "It was built in 1859," the keeper told us, "and in all that time it has been dark for two nights: once when
the oil was bad, once when my grandfather fell asleep." He showed us the lamp, the clockwork that turned it, and a
ledger with the name of every ship that passed. By three the water had come back. We sat on the steps, counted the
waves that reached the third one, and waited until somebody rowed across to fetch us.
"""

TINY_LIMIT = 1e-5
"""Four layers of random weights, logits around 1."""

REAL_LIMIT = 5e-4
"""Thirty layers, logits up to 36: float32 in another order of summation."""


@dataclass(frozen=True)
class Opinions:
    """Logits [ids, vocab] of one checkpoint by three programs."""

    ours: Doubles
    optimum: Doubles
    transformers: Doubles


Ask = Callable[[Path, Sequence[int]], Opinions]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Export a checkpoint with both exporters and run all ids through both graphs at once."""
    try:
        python = interpreter("oracle")
    except LookupError as error:
        pytest.fail(str(error))

    def opinions(checkpoint: Path, ids: Sequence[int]) -> Opinions:
        folder = tmp_path_factory.mktemp("oracle")
        (folder / "ids.json").write_text(json.dumps(list(ids)))
        script = Path(__file__).with_name("optimum_logits.py")
        command: list[str | Path] = [python, script, checkpoint, "--ids", folder / "ids.json", "--out", folder]
        subprocess.run(command, cwd=ROOT, env=offline(), check=True)
        unpacked = folder / "checkpoint"
        return Opinions(
            ours=our_logits(unpacked if unpacked.exists() else checkpoint, ids, folder / "ours"),
            optimum=np.load(folder / "optimum.npy").astype(np.float64),
            transformers=np.load(folder / "transformers.npy").astype(np.float64),
        )

    return opinions


def our_logits(checkpoint: Path, ids: Sequence[int], release: Path) -> Doubles:
    """What `--recipe fp32` makes of the checkpoint, run."""
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "export",
        checkpoint,
        "--recipe",
        "fp32",
        "--out",
        release,
        "--no-run",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    manifest = decode_manifest((release / MANIFEST_NAME).read_bytes(), str(release))
    return logits_of(release / manifest.graph, manifest.kv, list(ids))


def distance(one: Doubles, other: Doubles) -> float:
    """The largest difference of two logits."""
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


@pytest.fixture(scope="module")
def gpt_oss(ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> Opinions:
    """A tiny checkpoint in the real format, read to beyond its sliding window."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("gpt_oss"), TINY)
    chance = random.Random(3)
    return ask(checkpoint, [chance.randrange(TINY.vocab) for _ in range(4 * TINY.window - 1)])


@pytest.fixture(scope="module")
def smollm2(ask: Ask, smollm2_gguf: Path, smollm2_release: Path) -> Opinions:
    """The small real model, reading prose."""
    return ask(smollm2_gguf, Tokenizer.from_file(str(smollm2_release / "tokenizer.json")).encode(PROSE).ids)


# Tracing SmolLM2 takes optimum a minute on an idle machine, ten beside other tests.
@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestAgainstOptimum:
    """In each, the first line tells a fault of the oracle from one of ours."""

    def test_a_tiny_gpt_oss_has_optimums_logits(self, gpt_oss: Opinions) -> None:
        assert distance(gpt_oss.optimum, gpt_oss.transformers) <= TINY_LIMIT
        assert distance(gpt_oss.ours, gpt_oss.optimum) <= TINY_LIMIT

    def test_smollm2_has_optimums_logits(self, smollm2: Opinions) -> None:
        assert distance(smollm2.optimum, smollm2.transformers) <= REAL_LIMIT
        assert distance(smollm2.ours, smollm2.optimum) <= REAL_LIMIT


def test_a_missing_environment_is_a_failure_that_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECHAT_ORACLE_PYTHON", "/nowhere/python")
    with pytest.raises(LookupError, match="There is no /nowhere/python: run `make oracle`"):
        interpreter("oracle")
