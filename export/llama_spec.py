"""The sizes of one llama-family model, read from a GGUF's metadata and checked against its tensors.

Key and tensor names: the GGUF specification, architecture `llama`. Anything that the graph would silently leave out
(scaled rotary embeddings, experts, biases, tensors of unknown names) is refused.
Does not know where bytes lie, nor ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from export.errors import SourceError
from export.quantize import BlockFormat

Metadata = Mapping[str, object]
FAMILY = "llama"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the source: shape in numpy order (rows first), kind as GGUF calls it ("Q4_1", "F32" ...)."""

    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class LlamaSpec:
    """Sizes of the model; `formats` gives the block format of every quantised tensor by its source name."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context_tokens: int
    rope_base: float
    norm_epsilon: float
    tied_head: bool
    formats: Mapping[str, BlockFormat]


def read_spec(metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> LlamaSpec:
    """Sizes out of the metadata; raises SourceError for another family, a missing part or a part not carried over."""
    _refuse_other_families(metadata)
    hidden = _size(metadata, "llama.embedding_length")
    heads = _size(metadata, "llama.attention.head_count")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise SourceError("The file has no tensor 'token_embd.weight'; it is not a whole llama model, fetch it again.")
    spec = LlamaSpec(
        layers=_size(metadata, "llama.block_count"),
        hidden=hidden,
        intermediate=_size(metadata, "llama.feed_forward_length"),
        heads=heads,
        kv_heads=_size(metadata, "llama.attention.head_count_kv", heads),
        head_dim=_size(metadata, "llama.attention.key_length", hidden // heads),
        vocab=embedding.shape[0],
        context_tokens=_size(metadata, "llama.context_length"),
        rope_base=_number(metadata, "llama.rope.freq_base", 10_000.0),
        norm_epsilon=_number(metadata, "llama.attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in tensors,
        formats={},
    )
    _refuse_odd_heads(spec, metadata)
    return replace(spec, formats=_check_tensors(spec, tensors))


def expected_shapes(spec: LlamaSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that such a model has, by source name, in numpy order."""
    query, key_value = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (spec.vocab, spec.hidden),
        "output_norm.weight": (spec.hidden,),
    }
    if not spec.tied_head:
        shapes["output.weight"] = (spec.vocab, spec.hidden)
    for layer in range(spec.layers):
        prefix = f"blk.{layer}."
        shapes |= {
            prefix + "attn_norm.weight": (spec.hidden,),
            prefix + "attn_q.weight": (query, spec.hidden),
            prefix + "attn_k.weight": (key_value, spec.hidden),
            prefix + "attn_v.weight": (key_value, spec.hidden),
            prefix + "attn_output.weight": (spec.hidden, query),
            prefix + "ffn_norm.weight": (spec.hidden,),
            prefix + "ffn_gate.weight": (spec.intermediate, spec.hidden),
            prefix + "ffn_up.weight": (spec.intermediate, spec.hidden),
            prefix + "ffn_down.weight": (spec.hidden, spec.intermediate),
        }
    return shapes


def _check_tensors(spec: LlamaSpec, tensors: Mapping[str, TensorInfo]) -> dict[str, BlockFormat]:
    """Compare the file with `expected_shapes`; returns the block format of each matrix."""
    expected = expected_shapes(spec)
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise SourceError(
            f"The file has {len(unknown)} tensors that the llama graph does not use (first: {unknown[0]!r}); "
            "the model is of another kind, export it with a version that knows them."
        )
    formats: dict[str, BlockFormat] = {}
    for name, shape in expected.items():
        if name not in tensors:
            raise SourceError(f"The file has no tensor {name!r}; it is not a whole llama model, fetch it again.")
        found = tensors[name]
        if found.shape != shape:
            raise SourceError(f"The tensor {name!r} is {found.shape}, the metadata says {shape}; the file is damaged.")
        if len(shape) == 2:
            formats[name] = _block_format(found)
        elif found.kind != "F32":
            raise SourceError(f"The tensor {name!r} is stored as {found.kind}, F32 was expected; requantise the model.")
    _refuse_unlike_parts(spec, formats)
    return formats


def _block_format(tensor: TensorInfo) -> BlockFormat:
    try:
        block_format = BlockFormat(tensor.kind)
    except ValueError as error:
        known = ", ".join(BlockFormat)
        raise SourceError(
            f"The tensor {tensor.name!r} is stored as {tensor.kind}; this exporter carries over {known} without loss, "
            "take a GGUF of those types."
        ) from error
    if tensor.name in ("token_embd.weight", "output.weight") and not block_format.is_symmetric:
        raise SourceError(f"The tensor {tensor.name!r} is stored as {tensor.kind}; take a GGUF that has it as Q8_0.")
    return block_format


def _refuse_unlike_parts(spec: LlamaSpec, formats: Mapping[str, BlockFormat]) -> None:
    """Matrices that become one product must have one format."""
    for layer in range(spec.layers):
        for group in (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")):
            kinds = {formats[f"blk.{layer}.{part}.weight"] for part in group}
            if len(kinds) > 1:
                raise SourceError(
                    f"In layer {layer} {', '.join(group)} have different types ({', '.join(sorted(kinds))}); "
                    "take a GGUF that gives them one type."
                )


def _refuse_other_families(metadata: Metadata) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != FAMILY:
        raise SourceError(f"The model's architecture is {architecture!r}; this exporter knows {FAMILY!r}.")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise SourceError(f"The model scales its rotary embedding ({scaling!r}), which the llama graph does not do.")
    if metadata.get("llama.expert_count", 0) != 0:
        raise SourceError("The model has experts, which the llama graph has not; export a dense model.")


def _refuse_odd_heads(spec: LlamaSpec, metadata: Metadata) -> None:
    rotated = _size(metadata, "llama.rope.dimension_count", spec.head_dim)
    if rotated != spec.head_dim or spec.head_dim % 2 or spec.heads % spec.kv_heads:
        raise SourceError(
            f"The attention has {spec.heads} heads over {spec.kv_heads} of size {spec.head_dim}, {rotated} rotated; "
            "the llama graph needs whole heads rotated and heads a multiple of the key heads."
        )


def _size(metadata: Metadata, key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise SourceError(f"The metadata key {key!r} is {value!r}, not a positive whole number; the file is damaged.")
    return value


def _number(metadata: Metadata, key: str, default: float | None = None) -> float:
    value = metadata.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise SourceError(f"The metadata key {key!r} is {value!r}, not a positive number; the file is damaged.")
    return float(value)
