"""Logits of a checkpoint by optimum's ONNX export: a second opinion that shares no line with our exporter.

Runs in the environment of `make oracle`, whose transformers is older than ours, and therefore imports nothing of this
project. The graph is optimum's own (no fused operator, all experts computed), in fp32, run by its own class.

    .venv-oracle/bin/python tests/oracle/optimum_logits.py CHECKPOINT --ids ids.json --out FOLDER

CHECKPOINT is a Hugging Face folder, or a GGUF, which is first written out as one. FOLDER gets

    checkpoint/        only for a GGUF: its weights in fp32, for whoever wants to export the same thing
    onnx/              optimum's export
    optimum.npy        [len(ids), vocab] float32: the logits of all positions, by that graph
    transformers.npy   the same by the model that was exported: what optimum itself adds is the difference
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.exporters.onnx import main_export  # type: ignore[import-not-found]
from optimum.onnxruntime import ORTModelForCausalLM  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer


def unpack_gguf(gguf: Path, folder: Path) -> Path:
    """Write a GGUF as a Hugging Face folder, weights dequantised to fp32, tokenizer and template beside them."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


def export(checkpoint: Path, folder: Path) -> Path:
    """What `optimum-cli export onnx` does, except its own comparison: ours follows."""
    main_export(str(checkpoint), folder, task="text-generation-with-past", dtype="fp32", do_validation=False)
    return folder


def reference(checkpoint: Path) -> Any:
    """The checkpoint in transformers, fp32, every operator spelt out."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    # MXFP4 experts come as bfloat16, exactly, whatever dtype one asks for.
    return model.float()


def logits_of(model: Any, ids: Sequence[int]) -> Any:
    """Logits [len(ids), vocab] of all positions, computed at once."""
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0].float().numpy()


def main() -> None:
    """Export, run both, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder or a GGUF")
    parser.add_argument("--ids", type=Path, required=True, help="a JSON file with a list of token ids")
    parser.add_argument("--out", type=Path, required=True, help="where to write; an empty or a new folder")
    options = parser.parse_args()
    ids: list[int] = json.loads(options.ids.read_text())
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    checkpoint: Path = options.checkpoint
    if checkpoint.is_file():
        checkpoint = unpack_gguf(checkpoint, out / "checkpoint")
    graph = export(checkpoint, out / "onnx")
    np.save(out / "optimum.npy", logits_of(ORTModelForCausalLM.from_pretrained(graph), ids))
    np.save(out / "transformers.npy", logits_of(reference(checkpoint), ids))


if __name__ == "__main__":
    main()
