"""The llama family's forward pass written from its formulas, in float64, on the source's own conventions.

Of a llama it rotates neighbouring pairs (2i, 2i+1) of a head, as llama.cpp does on the rows as they lie in a GGUF, and
of a qwen2 halves: an exporter that undid the rows' order wrongly would not agree with it.
"""

from __future__ import annotations

import numpy as np

from export.spec import Divided, Family
from export.values import Doubles
from tests.export.tiny_gguf import TinyLlama


def logits(model: TinyLlama, ids: list[int]) -> Doubles:
    """Logits [len(ids), vocab] of all positions."""
    spec = model.spec
    weight = {name: model.weights(name) for name in model.raw}
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
    spec = model.spec
    queries = _rotate(model, _heads(part, "attn_q", x, spec.heads))
    keys = _rotate(model, _heads(part, "attn_k", x, spec.kv_heads))
    values = _heads(part, "attn_v", x, spec.kv_heads)
    shared = spec.heads // spec.kv_heads
    keys, values = keys.repeat(shared, axis=1), values.repeat(shared, axis=1)
    scores = np.einsum("qhd,khd->hqk", queries, keys) / np.sqrt(spec.head_dim)
    scores = np.where(np.tril(np.ones((len(x), len(x)), bool)), scores, -np.inf)
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    mixed: Doubles = np.einsum("hqk,khd->qhd", chances, values).reshape(len(x), -1)
    return mixed @ part["attn_output.weight"].T


def _heads(part: dict[str, Doubles], name: str, x: Doubles, heads: int) -> Doubles:
    """A product with its bias, [positions, heads, head_dim]."""
    product: Doubles = x @ part[f"{name}.weight"].T + part.get(f"{name}.bias", np.zeros(1))
    return product.reshape(len(x), heads, -1)


def _rotate(model: TinyLlama, x: Doubles) -> Doubles:
    """[positions, heads, head_dim]: rotate each pair by position * base ** (-2 i / head_dim) / divisor."""
    count, _, size = x.shape
    rope = model.spec.rope
    divisors = np.array(rope.scaling.divisors) if isinstance(rope.scaling, Divided) else np.ones(size // 2)
    angles = np.arange(count)[:, None, None] * rope.base ** (-np.arange(0, size, 2) / size) / divisors
    # Pairs lie next to each other in a llama's GGUF, half a head apart elsewhere.
    axes = (size // 2, 2) if model.architecture is Family.LLAMA else (2, size // 2)
    pairs = np.moveaxis(x.reshape(*x.shape[:-1], *axes), axes.index(2) - 2, -1)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    both = np.stack([turned.real, turned.imag], axis=axes.index(2) - 2)
    return both.reshape(x.shape)
