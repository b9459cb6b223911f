"""The forward pass of a GGUF's llama or qwen2 written from its formulas, in float64, on the file's own conventions.

A llama's rows lie so that neighbouring pairs (2i, 2i+1) of a head are rotated, as llama.cpp does; a qwen2's so that
its halves are (i, i + head_dim / 2). An exporter that confused the two would not agree with it.
"""

from __future__ import annotations

import numpy as np

from export.forms.values import Doubles
from export.spec import Divided, Family
from tests.export.tiny_gguf import TinyLlama


def logits(model: TinyLlama, ids: list[int]) -> Doubles:
    """Logits [len(ids), vocab] of all positions."""
    spec = model.spec
    weight = {name: model.weights(name) for name in model.shapes}
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

    def heads_of(name: str, heads: int) -> Doubles:
        projected: Doubles = x @ part[f"{name}.weight"].T + part.get(f"{name}.bias", 0.0)
        return projected.reshape(count, heads, spec.head_dim)

    queries = _rotate(model, heads_of("attn_q", spec.heads))
    keys = _rotate(model, heads_of("attn_k", spec.kv_heads))
    values = heads_of("attn_v", spec.kv_heads)
    shared = spec.heads // spec.kv_heads
    keys, values = keys.repeat(shared, axis=1), values.repeat(shared, axis=1)
    scores = np.einsum("qhd,khd->hqk", queries, keys) / np.sqrt(spec.head_dim)
    scores = np.where(np.tril(np.ones((count, count), bool)), scores, -np.inf)
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    mixed: Doubles = np.einsum("hqk,khd->qhd", chances, values).reshape(count, -1)
    return mixed @ part["attn_output.weight"].T


def _rotate(model: TinyLlama, x: Doubles) -> Doubles:
    """[positions, heads, head_dim]: rotate pair i by position * base ** (-2 i / head_dim) / divisor."""
    count, heads, size = x.shape
    rope = model.spec.rope
    divisors = np.array(rope.scaling.divisors) if isinstance(rope.scaling, Divided) else 1.0
    angles = np.arange(count)[:, None, None] * rope.base ** (-np.arange(0, size, 2) / size) / divisors
    if model.spec.family is Family.LLAMA:
        pairs = x.reshape(count, heads, -1, 2)
    else:
        pairs = x.reshape(count, heads, 2, -1).swapaxes(2, 3)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    rotated = np.stack([turned.real, turned.imag], axis=-1)
    return (rotated if model.spec.family is Family.LLAMA else rotated.swapaxes(2, 3)).reshape(x.shape)
