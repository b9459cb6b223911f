"""A release's logits against transformers' of the same checkpoint, in float32, on the text that quality is measured on.

transformers is asked in a process of its own (`export/trial/child.py`); what it says lies in a file meanwhile.
Does not know graphs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from core.manifest import Manifest
from export.checks.report import Check, Verdict
from export.errors import TargetError
from export.recipes import Recipe
from export.sources.checkpoint import Checkpoint
from export.trial import child
from export.trial.quality import Score

BYTES_MAX = 4_000_000_000
"""Models up to this size in float32 are given to transformers, which holds them as a whole, and while loading twice."""

RELATIVE_BOUND = 1e-4
"""Of the largest logit: how far a variant whose products are computed in float32 may be from transformers."""

_FLOAT_VARIANTS = (Recipe.FP32, Recipe.GGUF_PARITY)


class CannotCompare(TargetError):
    """transformers does not read the checkpoint."""


def check_logits(folder: Path, manifest: Manifest, checkpoint: Checkpoint | None) -> Iterator[Check]:
    """How near the release is; broken only for variants that must agree but for rounding.

    Raises TargetError if the graph is wrong.
    """
    obstacle = _obstacle(checkpoint)
    if checkpoint is None or obstacle is not None:
        yield Check(Verdict.SKIPPED, "logits", obstacle or "")
        return
    # Imported here: whoever has no runtime can check all but this.
    from export.trial.run import CannotRun, compare, text_ids

    ids = text_ids(folder, manifest)
    with tempfile.TemporaryDirectory(prefix="edgechat-verify-") as scratch:
        expected = Path(scratch) / "expected.npy"
        try:
            child.call(_write_logits, _place(checkpoint), ids[:-1], expected)
        except (CannotCompare, child.OutOfMemory) as error:
            yield Check(Verdict.SKIPPED, "logits", error.message)
            return
        found = compare(folder, manifest, ids, expected)
        if isinstance(found, CannotRun):
            yield Check(Verdict.SKIPPED, "logits", found.reason)
        else:
            largest = float(np.abs(np.load(expected, mmap_mode="r")).max())
            yield _judged(found, largest, manifest.variant)


def _obstacle(checkpoint: Checkpoint | None) -> str | None:
    if checkpoint is None:
        return "no --reference was given."
    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed; pip install torch 'edgechat[oracle]'."
    size_bytes = sum(4 * prod(tensor.shape) for tensor in checkpoint.tensors.values())
    if size_bytes > BYTES_MAX:
        return f"in float32 the model takes {size_bytes / 1e9:.1f} GB; transformers is asked up to {BYTES_MAX / 1e9:g}."
    return None


def _judged(found: Score, largest: float, variant: str) -> Check:
    distance = found.distance
    assert distance is not None
    detail = (
        f"{found.positions} positions against transformers in float32: KL {distance.kl_divergence:.3g}, top-1 "
        f"{distance.top1_agreement:.2%}, perplexity {found.perplexity:.3f} ({distance.perplexity:.3f}), "
        f"largest difference {distance.largest_difference:.3g} at logits up to {largest:.3g}"
    )
    if variant not in _FLOAT_VARIANTS:
        return Check(Verdict.OK, "logits", f"{detail}.")
    if distance.largest_difference <= RELATIVE_BOUND * largest:
        return Check(Verdict.OK, "logits", f"{detail}, within {RELATIVE_BOUND:g} of them.")
    return Check(Verdict.BROKEN, "logits", f"{detail}: more than {RELATIVE_BOUND:g} of them.")


def _place(checkpoint: Checkpoint) -> Path:
    """The GGUF file or the folder that the checkpoint lies in."""
    (extent, *_) = checkpoint.extents(next(iter(checkpoint.tensors)))
    return extent.path if extent.path.suffix == ".gguf" else extent.path.parent


def _write_logits(place: Path, ids: list[int], target: Path) -> None:
    """transformers' logits [len(ids), vocab] of all positions, into a .npy file; raises CannotCompare."""
    os.environ["TQDM_DISABLE"] = "1"  # read when the library is loaded; the process is this function's own
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"gguf_file": place.name} if place.is_file() else {}
    folder = place.parent if place.is_file() else place
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **source)
        if hasattr(config, "quantization_config"):
            options["quantization_config"] = Mxfp4Config(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, **source, **options).eval()
    except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise CannotCompare(f"transformers does not read {place.name} ({words}).") from error
    with torch.inference_mode():
        np.save(target, model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy())
