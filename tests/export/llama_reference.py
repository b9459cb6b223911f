"""The llama forward pass written from its formulas, in float64, on the source's own conventions.

Rotates neighbouring pairs (2i, 2i+1) of a head, as llama.cpp does on the rows as they lie in a GGUF: an exporter that
undid the rows' order wrongly would not agree with it.
"""

from __future__ import annotations

import numpy as np

from export.quantize import Doubles
from tests.export.tiny_gguf import TinyLlama


def logits(model: TinyLlama, ids: list[int]) -> Doubles:
    """Logits [len(ids), vocab] of all positions."""
    spec = model.spec
    weight = {name: blocks.to_doubles() for name, blocks in model.blocks.items()}
    weight |= {name: np.asarray(values, np.float64) for name, values in model.tensors.items()}
    x = weight["token_embd.weight"][ids]
    for layer in range(spec.layers):
        part = {
            name.removeprefix(f"blk.{layer}."): value
            for name, value in weight.items()
            if name.startswith(f"blk.{layer}.")
        }
        x = x + _attention(model, part, _norm(x, part["attn_norm.weight"], spec.norm_epsilon))
        y = _norm(x, part["ffn_norm.weight"], spec.norm_epsilon)
        gate = y @ part["ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ part["ffn_up.weight"].T)) @ part["ffn_down.weight"].T
    head = weight["token_embd.weight" if spec.tied_head else "output.weight"]
    return _norm(x, weight["output_norm.weight"], spec.norm_epsilon) @ head.T


def _norm(x: Doubles, weight: Doubles, epsilon: float) -> Doubles:
    result: Doubles = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight
    return result


def _attention(model: TinyLlama, part: dict[str, Doubles], x: Doubles) -> Doubles:
    spec, count = model.spec, len(x)
    queries = _rotate((x @ part["attn_q.weight"].T).reshape(count, spec.heads, spec.head_dim), spec.rope_base)
    keys = _rotate((x @ part["attn_k.weight"].T).reshape(count, spec.kv_heads, spec.head_dim), spec.rope_base)
    values = (x @ part["attn_v.weight"].T).reshape(count, spec.kv_heads, spec.head_dim)
    shared = spec.heads // spec.kv_heads
    keys, values = keys.repeat(shared, axis=1), values.repeat(shared, axis=1)
    scores = np.einsum("qhd,khd->hqk", queries, keys) / np.sqrt(spec.head_dim)
    scores = np.where(np.tril(np.ones((count, count), bool)), scores, -np.inf)
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    mixed: Doubles = np.einsum("hqk,khd->qhd", chances, values).reshape(count, -1)
    return mixed @ part["attn_output.weight"].T


def _rotate(x: Doubles, base: float) -> Doubles:
    """[positions, heads, head_dim]: rotate each pair of neighbours by position * base ** (-2 i / head_dim)."""
    count, _, size = x.shape
    angles = np.arange(count)[:, None, None] * base ** (-np.arange(0, size, 2) / size)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
