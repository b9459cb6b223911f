"""A release that is about to be published is run, if this machine can, and what came of it is put into words.

The release is compared with the same model in float32, which is written beside it for that time if it is small.
Does not know how a graph is run.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from core.manifest import Golden, Manifest
from export.recipes import Plan, Recipe
from export.release.data import Drawing, write_reference
from export.trial.quality import Quality, why_no_reference

_HOW = {True: "bit-identical", False: "not bit-identical"}


@dataclass(frozen=True)
class Trial:
    """What the manifest and quality.json say about running the release; quality: or why it was not run."""

    batch_invariant: bool
    golden: list[Golden]
    quality: Quality | str
    claims: dict[str, str]


def not_measured(reason: str) -> Trial:
    """Nothing is known, and claimed, of a release that did not run."""
    words = f"not measured: {reason}"
    return Trial(False, [], words, {"chunks": words, "batches": words})


NOT_ASKED = not_measured("the export was made with --no-run")


def draw_reference(drawing: Drawing) -> Drawing | str:
    """The same model in float32, or why there is none."""
    if drawing.plan.recipe is Recipe.FP32:
        return "the release is in float32 itself"
    if drawing.graph.operators():
        return "the release cannot run here"
    return why_no_reference(drawing.checkpoint.tensors) or Drawing.of(drawing.checkpoint, Plan(Recipe.FP32))


def try_release(folder: Path, manifest: Manifest, drawing: Drawing, reference: Drawing | str, scratch: Path) -> Trial:
    """Run the release in `folder`; `scratch`: where the reference may be written. Raises TargetError if the graph is
    wrong, SourceError if the model's context is too short for a release."""
    if find_spec("onnxruntime") is None:
        return not_measured("onnxruntime is not installed where it was exported")
    # Imported here: whoever only writes a release needs no runtime, and no memory for it while writing.
    from export.trial import run

    if isinstance(reference, str):
        compared = run.Reference(reference, None)
    else:
        scratch.mkdir()
        compared = run.Reference("the same weights in float32", write_reference(reference, scratch))
    ran = run.measure(folder, manifest, max(drawing.checkpoint.spec.windows), compared)
    shutil.rmtree(scratch, ignore_errors=True)
    if isinstance(ran, run.CannotRun):
        return not_measured(ran.reason)
    if manifest.device != "cpu":
        tried = not_measured("the release is for a GPU and was tried on a CPU")
        return replace(tried, golden=list(ran.golden), quality=ran.quality)
    found = ran.invariance
    claims = {
        "chunks": f"{_HOW[found.chunks]} for all chunk lengths tried, from 2 tokens up, on the exporting machine",
        "batches": f"{_HOW[found.batches]} for decode batches of 1 and 8 on the exporting machine",
    }
    return Trial(found.chunks and found.batches, list(ran.golden), ran.quality, claims)
