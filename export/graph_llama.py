"""The llama family as an ONNX graph, graph ABI 1, fused operators from the start.

    input_ids -> embedding
              -> [ norm -> qkv -> attention -> output -> +, norm -> gate_up -> silu * -> down -> + ] x layers
              -> norm -> rows at logits_indices -> head -> logits

Every `+` and the norm behind it are one SkipSimplifiedLayerNormalization, which also hands on the sum. One definition
for all models of the family and all recipes: sizes come from the spec, and only `_product` knows recipes.
Does not know where weights come from or go to.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from export.llama_spec import LlamaSpec
from export.onnx_graph import MICROSOFT, GraphBuilder, Matrix, Part, Table, Vector, View
from export.quantize import BLOCK, Floats
from export.recipes import Recipe

GRAPH_NAME = "llama"


def build_graph(spec: LlamaSpec, recipe: Recipe) -> GraphBuilder:
    """All nodes, inputs, outputs and weight declarations of one model."""
    graph = GraphBuilder()
    _declare_interface(graph, spec)
    cos, sin = rotary_tables(spec)
    graph.weight(Table("rotary.cos", cos))
    graph.weight(Table("rotary.sin", sin))
    residual = _embedding(graph, spec)
    norm = graph.weight(Vector("layers.0.attention_norm", "blk.0.attn_norm.weight"))
    normed = graph.node(
        "SimplifiedLayerNormalization",
        "/layers.0/attention_norm",
        [residual, norm],
        axis=-1,
        epsilon=spec.norm_epsilon,
        stash_type=TensorProto.FLOAT,
    )
    for layer in range(spec.layers):
        attended = _attention(graph, spec, recipe, layer, normed)
        normed, residual = _add_norm(
            graph, spec, f"layers.{layer}", "mlp_norm", f"blk.{layer}.ffn_norm.weight", residual, attended
        )
        fed = _mlp(graph, spec, recipe, layer, normed)
        if layer + 1 < spec.layers:
            target = (f"layers.{layer + 1}", "attention_norm", f"blk.{layer + 1}.attn_norm.weight")
        else:
            target = ("head", "norm", "output_norm.weight")
        normed, residual = _add_norm(graph, spec, *target, residual, fed)
    _head(graph, spec, recipe, normed)
    return graph


def rotary_tables(spec: LlamaSpec) -> tuple[Floats, Floats]:
    """Cosines and sines [context_tokens, head_dim / 2], computed in float64 and rounded once."""
    frequencies = spec.rope_base ** (-np.arange(0, spec.head_dim, 2) / spec.head_dim)
    angles = np.arange(spec.context_tokens)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _declare_interface(graph: GraphBuilder, spec: LlamaSpec) -> None:
    """Graph ABI 1: names, element types and symbolic sizes of inputs and outputs."""
    info = helper.make_tensor_value_info
    graph.inputs += [
        info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
        info("seqlens_k", TensorProto.INT32, ["batch"]),
        info("total_length", TensorProto.INT32, []),
        info("logits_indices", TensorProto.INT64, ["rows"]),
    ]
    graph.outputs.append(info("logits", TensorProto.FLOAT, ["rows", spec.vocab]))
    for layer in range(spec.layers):
        for kind in ("key", "value"):
            past = ["batch", spec.kv_heads, "past_capacity", spec.head_dim]
            present = ["batch", spec.kv_heads, "present_capacity", spec.head_dim]
            graph.inputs.append(info(f"past_{kind}.{layer}", TensorProto.FLOAT, past))
            graph.outputs.append(info(f"present_{kind}.{layer}", TensorProto.FLOAT, present))


def _embedding(graph: GraphBuilder, spec: LlamaSpec) -> str:
    """Rows of the quantised table, dequantised: [batch, tokens, hidden]."""
    name = "embedding"
    graph.weight(Matrix(name, (Part("token_embd.weight"),), spec.formats["token_embd.weight"]))
    table = graph.weight(View(f"{name}.table", f"{name}.codes", (spec.vocab, spec.hidden)))
    return graph.node(
        "GatherBlockQuantized",
        "/embedding",
        [table, "input_ids", f"{name}.scales"],
        domain=MICROSOFT,
        bits=spec.formats["token_embd.weight"].bits,
        block_size=BLOCK,
        gather_axis=0,
        quantize_axis=1,
    )


def _attention(graph: GraphBuilder, spec: LlamaSpec, recipe: Recipe, layer: int, x: str) -> str:
    """Causal attention over the cache bound in place, one product for q, k and v."""
    prefix = f"blk.{layer}."
    parts = (
        Part(prefix + "attn_q.weight", rotary_heads=spec.heads),
        Part(prefix + "attn_k.weight", rotary_heads=spec.kv_heads),
        Part(prefix + "attn_v.weight"),
    )
    name = f"layers.{layer}.attention"
    rows = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    qkv = _product(graph, spec, recipe, f"{name}.qkv", parts, x, rows, spec.hidden)
    attended = graph.node(
        "GroupQueryAttention",
        _path(name),
        [
            *(qkv, "", ""),
            *(f"past_key.{layer}", f"past_value.{layer}"),
            *("seqlens_k", "total_length", "rotary.cos", "rotary.sin"),
        ],
        [_path(name), f"present_key.{layer}", f"present_value.{layer}"],
        domain=MICROSOFT,
        num_heads=spec.heads,
        kv_num_heads=spec.kv_heads,
        do_rotary=1,
    )
    output = (Part(prefix + "attn_output.weight"),)
    return _product(graph, spec, recipe, f"{name}.output", output, attended, spec.hidden, spec.heads * spec.head_dim)


def _mlp(graph: GraphBuilder, spec: LlamaSpec, recipe: Recipe, layer: int, x: str) -> str:
    """down(silu(gate(x)) * up(x)), one product for gate and up."""
    prefix, name = f"blk.{layer}.", f"layers.{layer}.mlp"
    parts = (Part(prefix + "ffn_gate.weight"), Part(prefix + "ffn_up.weight"))
    both = _product(graph, spec, recipe, f"{name}.gate_up", parts, x, 2 * spec.intermediate, spec.hidden)
    gate, up = f"{_path(name)}/gate", f"{_path(name)}/up"
    graph.node("Split", f"{_path(name)}/split", [both], [gate, up], axis=-1, num_outputs=2)
    # QuickGelu is x * sigmoid(alpha x): silu when alpha is 1.
    silu = graph.node("QuickGelu", f"{_path(name)}/silu", [gate], domain=MICROSOFT, alpha=1.0)
    gated = graph.node("Mul", f"{_path(name)}/gated", [silu, up])
    down = (Part(prefix + "ffn_down.weight"),)
    return _product(graph, spec, recipe, f"{name}.down", down, gated, spec.hidden, spec.intermediate)


def _add_norm(
    graph: GraphBuilder, spec: LlamaSpec, owner: str, norm: str, tensor: str, residual: str, added: str
) -> tuple[str, str]:
    """Add to the residual stream and normalise the sum; returns (normed, sum)."""
    weight = graph.weight(Vector(f"{owner}.{norm}", tensor))
    normed, total = f"/{owner}/{norm}", f"/{owner}/{norm}/residual"
    graph.node(
        "SkipSimplifiedLayerNormalization",
        normed,
        [residual, added, weight],
        [normed, "", "", total],
        domain=MICROSOFT,
        epsilon=spec.norm_epsilon,
    )
    return normed, total


def _head(graph: GraphBuilder, spec: LlamaSpec, recipe: Recipe, normed: str) -> None:
    """Logits of the wanted positions only; `logits_indices` count into batch * tokens and may be none."""
    flat = graph.constant("head.flat_shape", np.array([-1, spec.hidden], np.int64))
    rows = graph.node("Reshape", "/head/flat", [normed, flat])
    wanted = graph.node("Gather", "/head/wanted", [rows, "logits_indices"], axis=0)
    weights = "embedding"
    block_format = spec.formats["token_embd.weight"]
    if not spec.tied_head:
        block_format = spec.formats["output.weight"]
        weights = graph.weight(Matrix("head", (Part("output.weight"),), block_format))
    inputs = [wanted, f"{weights}.codes", f"{weights}.scales"]
    _mat_mul_n_bits(graph, recipe, "/head", inputs, ["logits"], spec.vocab, spec.hidden, block_format.bits)


def _product(
    graph: GraphBuilder,
    spec: LlamaSpec,
    recipe: Recipe,
    name: str,
    parts: tuple[Part, ...],
    x: str,
    rows: int,
    columns: int,
) -> str:
    """x [..., columns] times the stacked parts, transposed: [..., rows]. Forms: see `export/layouts.py`."""
    block_format = spec.formats[parts[0].tensor]
    graph.weight(Matrix(name, parts, block_format))
    inputs, path = [x, f"{name}.codes", f"{name}.scales"], _path(name)
    if block_format.is_symmetric:
        return _mat_mul_n_bits(graph, recipe, path, inputs, [path], rows, columns, block_format.bits)
    match recipe:
        case Recipe.GGUF_PARITY:
            inputs.append(f"{name}.zero_points")
            return _mat_mul_n_bits(graph, recipe, path, inputs, [path], rows, columns, block_format.bits)
        case Recipe.GGUF_EXACT:
            uncorrected = f"{path}/uncorrected"
            _mat_mul_n_bits(graph, recipe, uncorrected, inputs, [uncorrected], rows, columns, block_format.bits)
            sums = _block_sums(graph, x, path, columns)
            correction = graph.node("MatMul", f"{path}/correction", [sums, f"{name}.corrections"])
            return graph.node("Add", path, [uncorrected, correction])


def _block_sums(graph: GraphBuilder, x: str, path: str, columns: int) -> str:
    """Sums of 32 neighbours: [batch, tokens, columns] -> [batch, tokens, columns / 32]."""
    shape = graph.constant(f"blocks_of_{columns}", np.array([0, 0, columns // BLOCK, BLOCK], np.int64))
    axis = graph.constant("last_axis", np.array([-1], np.int64))
    blocks = graph.node("Reshape", f"{path}/blocks", [x, shape])
    return graph.node("ReduceSum", f"{path}/block_sums", [blocks, axis], keepdims=0)


def _mat_mul_n_bits(
    graph: GraphBuilder,
    recipe: Recipe,
    name: str,
    inputs: list[str],
    outputs: list[str],
    rows: int,
    columns: int,
    bits: int,
) -> str:
    return graph.node(
        "MatMulNBits",
        name,
        inputs,
        outputs,
        domain=MICROSOFT,
        N=rows,
        K=columns,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=recipe.accuracy_level,
    )


def _path(name: str) -> str:
    """Weights are called layers.0.mlp.down, the nodes that use them /layers.0/mlp/down."""
    owner, _, rest = name.partition(".")
    if owner == "layers":
        index, _, rest = rest.partition(".")
        owner = f"layers.{index}"
    return "/" + "/".join([owner, *rest.split(".")])
