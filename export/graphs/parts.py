"""What all families share: the graph around their feed-forwards, graph ABI 1, fused operators from the start.

    input_ids -> embedding
              -> [ norm -> qkv -> attention -> output -> +, norm -> feed-forward -> + ] x layers
              -> norm -> rows at logits_indices -> head -> logits

Every `+` and the norm behind it are one SkipSimplifiedLayerNormalization, which also hands on the sum. Sizes come from
the spec, forms from the plan; recipes differ in nothing else than the type that flows and what
`export/graphs/matrix.py` makes of a form. Does not know where weights come from or go to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from onnx import TensorProto, helper

from export.graphs.builder import MICROSOFT, Matrix, Table
from export.graphs.draft import Draft, path_of
from export.graphs.matrix import look_up, multiply, product
from export.graphs.rope import rotary_tables

FeedForward: TypeAlias = Callable[[Draft, int, str], str]
"""(draft, layer, x [batch, tokens, hidden]) -> [batch, tokens, hidden], without the residual."""


def draw_decoder(draft: Draft, feed_forward: FeedForward) -> None:
    """All nodes, inputs, outputs and weight declarations of one model."""
    _declare_interface(draft)
    _declare_rotary_tables(draft)
    embedding = draft.matrix("embedding", ("model.embed_tokens.weight",))
    residual = look_up(draft, embedding, "input_ids", "/embedding")
    normed = _first_norm(draft, residual)
    for layer in range(draft.spec.layers):
        source, name = f"model.layers.{layer}", f"layers.{layer}"
        attended = _attention(draft, layer, normed)
        norm = f"{source}.post_attention_layernorm.weight"
        normed, residual = _add_norm(draft, f"{name}.mlp_norm", norm, residual, attended)
        fed = feed_forward(draft, layer, normed)
        if layer + 1 < draft.spec.layers:
            norm = f"model.layers.{layer + 1}.input_layernorm.weight"
            normed, residual = _add_norm(draft, f"layers.{layer + 1}.attention_norm", norm, residual, fed)
        else:
            normed, residual = _add_norm(draft, "head.norm", "model.norm.weight", residual, fed)
    _head(draft, embedding, normed)


def _declare_interface(draft: Draft) -> None:
    """Graph ABI 1: names, element types and symbolic sizes of inputs and outputs."""
    graph, spec = draft.graph, draft.spec
    floats = helper.np_dtype_to_tensor_dtype(draft.floats)
    info = helper.make_tensor_value_info
    graph.inputs += [
        info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
        info("seqlens_k", TensorProto.INT32, ["batch"]),
        info("total_length", TensorProto.INT32, []),
        info("logits_indices", TensorProto.INT64, ["rows"]),
    ]
    graph.outputs.append(info("logits", floats, ["rows", spec.vocab]))
    for layer in range(spec.layers):
        for kind in ("key", "value"):
            past = ["batch", spec.kv_heads, "past_capacity", spec.head_dim]
            present = ["batch", spec.kv_heads, "present_capacity", spec.head_dim]
            graph.inputs.append(info(f"past_{kind}.{layer}", floats, past))
            graph.outputs.append(info(f"present_{kind}.{layer}", floats, present))


def _declare_rotary_tables(draft: Draft) -> None:
    cos, sin = rotary_tables(draft.spec.rope, draft.spec.head_dim, draft.spec.context_tokens)
    draft.graph.weight(Table("rotary.cos", cos.astype(draft.floats, copy=False)))
    draft.graph.weight(Table("rotary.sin", sin.astype(draft.floats, copy=False)))


def _first_norm(draft: Draft, residual: str) -> str:
    norm = draft.vector("layers.0.attention_norm", ("model.layers.0.input_layernorm.weight",))
    return draft.graph.node(
        "SimplifiedLayerNormalization",
        path_of("layers.0.attention_norm"),
        [residual, norm],
        axis=-1,
        epsilon=draft.spec.norm_epsilon,
        stash_type=TensorProto.FLOAT,
    )


def _add_norm(draft: Draft, name: str, tensor: str, residual: str, added: str) -> tuple[str, str]:
    """Add to the residual stream and normalise the sum; returns (normed, sum)."""
    weight = draft.vector(name, (tensor,))
    normed = path_of(name)
    total = f"{normed}/residual"
    draft.graph.node(
        "SkipSimplifiedLayerNormalization",
        normed,
        [residual, added, weight],
        [normed, "", "", total],
        domain=MICROSOFT,
        epsilon=draft.spec.norm_epsilon,
    )
    return normed, total


def _attention(draft: Draft, layer: int, x: str) -> str:
    """Causal attention over the cache bound in place, one product for q, k and v."""
    spec, name, source = draft.spec, f"layers.{layer}.attention", f"model.layers.{layer}.self_attn"
    projections = tuple(f"{source}.{part}_proj" for part in ("q", "k", "v"))
    qkv_bias = tuple(f"{projection}.bias" for projection in projections) if spec.qkv_bias else ()
    weights = tuple(f"{projection}.weight" for projection in projections)
    qkv = product(draft, f"{name}.qkv", weights, x, qkv_bias)
    inputs = [
        *(qkv, "", ""),
        *(f"past_key.{layer}", f"past_value.{layer}"),
        *("seqlens_k", "total_length", "rotary.cos", "rotary.sin"),
    ]
    if spec.sinks:
        inputs += ["", "", draft.vector(f"{name}.sinks", (f"{source}.sinks",))]
    # The scale is the operator's own: 1 / sqrt(head_dim).
    attended = draft.graph.node(
        "GroupQueryAttention",
        path_of(name),
        inputs,
        [path_of(name), f"present_key.{layer}", f"present_value.{layer}"],
        domain=MICROSOFT,
        num_heads=spec.heads,
        kv_num_heads=spec.kv_heads,
        do_rotary=1,
        **({"local_window_size": spec.windows[layer]} if spec.windows[layer] else {}),
    )
    output_bias = (f"{source}.o_proj.bias",) if spec.output_bias else ()
    return product(draft, f"{name}.output", (f"{source}.o_proj.weight",), attended, output_bias)


def _head(draft: Draft, embedding: Matrix, normed: str) -> None:
    """Logits of the wanted positions only; `logits_indices` count into batch * tokens and may be none."""
    graph = draft.graph
    flat = graph.constant("head.flat_shape", np.array([-1, draft.spec.hidden], np.int64))
    rows = graph.node("Reshape", "/head/flat", [normed, flat])
    wanted = graph.node("Gather", "/head/wanted", [rows, "logits_indices"], axis=0)
    matrix = embedding if draft.spec.tied_head else draft.matrix("head", ("lm_head.weight",))
    multiply(draft, matrix, wanted, "/head", output="logits", axes=2)
