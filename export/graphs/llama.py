"""The llama family's own part of a graph: a gated feed-forward. Llama, and qwen2, whose attention has biases.

Does not know forms, recipes or where weights come from.
"""

from __future__ import annotations

from export.graphs.builder import MICROSOFT
from export.graphs.draft import Draft, path_of
from export.graphs.matrix import product
from export.graphs.parts import draw_decoder


def draw_llama(draft: Draft) -> None:
    """The whole model."""
    draw_decoder(draft, _feed_forward)


def _feed_forward(draft: Draft, layer: int, x: str) -> str:
    """down(silu(gate(x)) * up(x)), one product for gate and up."""
    graph, name, source = draft.graph, f"layers.{layer}.mlp", f"model.layers.{layer}.mlp"
    path = path_of(name)
    both = product(draft, f"{name}.gate_up", (f"{source}.gate_proj.weight", f"{source}.up_proj.weight"), x)
    gate, up = f"{path}/gate", f"{path}/up"
    graph.node("Split", f"{path}/split", [both], [gate, up], axis=-1, num_outputs=2)
    # QuickGelu is x * sigmoid(alpha x): silu when alpha is 1.
    silu = graph.node("QuickGelu", f"{path}/silu", [gate], domain=MICROSOFT, alpha=1.0)
    gated = graph.node("Mul", f"{path}/gated", [silu, up])
    return product(draft, f"{name}.down", (f"{source}.down_proj.weight",), gated)
