"""The graph of any model that the exporter knows."""

from __future__ import annotations

from collections.abc import Mapping

from export.errors import SourceError
from export.graphs.builder import GraphBuilder
from export.graphs.draft import Draft
from export.graphs.gptoss import draw_gptoss
from export.graphs.llama import draw_llama
from export.recipes import Plan
from export.spec import DecoderSpec, Family, TensorInfo

HEAD_STEP = 16
"""What GroupQueryAttention's rotation divides heads into, on the CPU and on CUDA."""


def build_graph(spec: DecoderSpec, tensors: Mapping[str, TensorInfo], plan: Plan) -> GraphBuilder:
    """All nodes, inputs, outputs and weight declarations; `tensors` are the checkpoint's.

    Raises SourceError for a tensor that the plan has no form for, and for heads that no attention operator takes.
    """
    _check_heads(spec)
    draft = Draft(GraphBuilder(), spec, tensors, plan)
    match spec.family:
        case Family.LLAMA | Family.QWEN2:
            draw_llama(draft)
        case Family.GPT_OSS:
            draw_gptoss(draft)
    return draft.graph


def _check_heads(spec: DecoderSpec) -> None:
    """GroupQueryAttention's own conditions, said before hours of work rather than by the first run."""
    if spec.head_dim % HEAD_STEP or spec.heads % spec.kv_heads:
        raise SourceError(
            f"The model has {spec.heads} heads over {spec.kv_heads} of {spec.head_dim} numbers each; attention needs "
            f"heads of a multiple of {HEAD_STEP} numbers and a multiple of the key heads, take another model."
        )
