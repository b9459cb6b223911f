"""gpt-oss's own part of a graph: a router and a mixture of experts, one operator for all of them.

    ExpertFloat   MoE                                    recipe fp32
    ExpertBits    QMoE, integers in blocks               *-int8, *-int4
    ExpertFp4     QMoE, quant_type fp4, on CUDA only     cuda-fp4
    ExpertMxfp4   edgechat.MoeMxfp4, an operator of ours (docs/decisions/014)      cpu-mxfp4

All of them take x, one row of router logits a token, and matrices whose gate and up rows alternate, as in the
checkpoint; they choose the largest logits, and the softmax of the chosen ones weighs the experts' outputs.
"""

from __future__ import annotations

import numpy as np

from export.forms.experts import ExpertBits, ExpertFloat, ExpertFp4, ExpertMxfp4
from export.forms.values import MXFP4_BLOCK
from export.graphs.builder import EDGECHAT, MICROSOFT, Matrix
from export.graphs.draft import Draft, path_of
from export.graphs.matrix import product
from export.graphs.parts import draw_decoder
from export.spec import ExpertSpec


def draw_gptoss(draft: Draft) -> None:
    """The whole model; its spec has experts."""
    draw_decoder(draft, _feed_forward)


def _feed_forward(draft: Draft, layer: int, x: str) -> str:
    """The weighted sum of the chosen experts' clamped SwiGLU."""
    experts = draft.spec.experts
    if experts is None:
        raise ValueError("a gpt_oss model has experts")
    source, name = f"model.layers.{layer}.mlp", f"layers.{layer}.experts"
    scores = _router(draft, layer, x, experts)
    gate_up = draft.matrix(f"{name}.gate_up", (f"{source}.experts.gate_up_proj",), experts.count)
    down = draft.matrix(f"{name}.down", (f"{source}.experts.down_proj",), experts.count)
    biases = [
        draft.vector(f"{matrix.name}.bias", (f"{source}.experts.{projection}_bias",))
        for matrix, projection in ((gate_up, "gate_up_proj"), (down, "down_proj"))
    ]
    return _mixture(draft, path_of(name), [x, scores], [gate_up, down], biases, experts)


def _router(draft: Draft, layer: int, x: str, experts: ExpertSpec) -> str:
    """Logits [batch * tokens, experts], computed in float32 whatever flows through the graph."""
    name, source = f"layers.{layer}.mlp.router", f"model.layers.{layer}.mlp.router"
    logits = product(draft, name, (f"{source}.weight",), x, (f"{source}.bias",))
    shape = draft.graph.constant("router.shape", np.array([-1, experts.count], np.int64))
    return draft.graph.node("Reshape", f"{path_of(name)}/flat", [logits, shape])


def _mixture(
    draft: Draft, path: str, routed: list[str], matrices: list[Matrix], biases: list[str], experts: ExpertSpec
) -> str:
    """One node for all experts; the form of the first matrix, which both share, says which."""

    def inputs(*arrays: str) -> list[str]:
        stored = [[f"{matrix.name}.{array}" for array in arrays] for matrix in matrices]
        return [*routed, *stored[0], biases[0], *stored[1], biases[1]]

    node = draft.graph.node
    match matrices[0].form:
        case ExpertFloat():
            return node("MoE", path, inputs("weight"), [path], domain=MICROSOFT, **_swiglu(experts))
        case ExpertBits(bits=bits, block=block):
            return node(
                "QMoE",
                path,
                inputs("codes", "scales"),
                [path],
                domain=MICROSOFT,
                **_swiglu(experts),
                expert_weight_bits=bits,
                block_size=block,
                accuracy_level=draft.accuracy_level,
                # The codes lie as a quantiser leaves them; a kernel that wants another order makes it when it loads.
                weights_prepacked=0,
            )
        case ExpertFp4():
            ones = draft.graph.constant("experts.global_scale", np.ones(experts.count, np.float32))
            no_fc3_zero_points_or_router_weights = [""] * 7
            return node(
                "QMoE",
                path,
                [*inputs("codes", "scales"), *no_fc3_zero_points_or_router_weights, ones, ones],
                [path],
                domain=MICROSOFT,
                **_swiglu(experts),
                quant_type="fp4",
                expert_weight_bits=4,
                block_size=MXFP4_BLOCK,
            )
        case ExpertMxfp4():
            return node(
                "MoeMxfp4",
                path,
                inputs("codes", "scales"),
                [path],
                domain=EDGECHAT,
                k=experts.per_token,
                limit=experts.limit,
                alpha=experts.alpha,
            )
    raise ValueError(f"no operator mixes experts that are stored as {matrices[0].form.label}")


def _swiglu(experts: ExpertSpec) -> dict[str, int | float | str]:
    """Attributes that MoE and QMoE share. swiglu_fusion 1: gate and up rows alternate."""
    return {
        "k": experts.per_token,
        "normalize_routing_weights": 1,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "swiglu_limit": experts.limit,
        "activation_alpha": experts.alpha,
        "activation_beta": 1.0,
    }
