"""Run a written graph on one sequence, plainly: everything as numpy feeds, the whole prompt in one chunk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime

from core.manifest import KvShape
from export.quantize import Doubles


def logits_of(graph: Path, kv: KvShape, ids: list[int]) -> Doubles:
    """Logits [len(ids), vocab] of all positions.

    Runs in a thread of its own, since onnxruntime leaves its thread rounding denormals to zero.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_run, graph, kv, ids).result()


def _run(graph: Path, kv: KvShape, ids: list[int]) -> Doubles:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feeds = {
        "input_ids": np.array([ids], np.int64),
        "seqlens_k": np.array([len(ids) - 1], np.int32),
        "total_length": np.array(len(ids), np.int32),
        "logits_indices": np.arange(len(ids)),
    }
    for layer in range(kv.layers):
        for kind in ("key", "value"):
            feeds[f"past_{kind}.{layer}"] = np.zeros((1, kv.kv_heads, len(ids), kv.head_dim), np.float32)
    logits: Doubles = session.run(["logits"], feeds)[0].astype(np.float64)
    return logits


def log_softmax(logits: Doubles) -> Doubles:
    """Logarithms of probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: Doubles = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
