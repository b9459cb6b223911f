"""The graph of any model that the exporter knows."""

from __future__ import annotations

from collections.abc import Mapping

from export.graph_draft import Draft
from export.graph_gptoss import draw_gptoss
from export.graph_llama import draw_llama
from export.onnx_graph import GraphBuilder
from export.recipes import Plan
from export.spec import DecoderSpec, Family, TensorInfo


def build_graph(spec: DecoderSpec, tensors: Mapping[str, TensorInfo], plan: Plan) -> GraphBuilder:
    """All nodes, inputs, outputs and weight declarations; `tensors` are the checkpoint's.

    Raises SourceError for a tensor that the plan has no form for.
    """
    draft = Draft(GraphBuilder(), spec, tensors, plan)
    match spec.family:
        case Family.LLAMA | Family.QWEN2:
            draw_llama(draft)
        case Family.GPT_OSS:
            draw_gptoss(draft)
    return draft.graph
