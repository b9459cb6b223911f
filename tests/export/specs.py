"""Specs and tensor lists of whole models, for what is decided from them alone."""

from __future__ import annotations

from export.spec import (
    DecoderSpec,
    ExpertSpec,
    Family,
    Kind,
    Role,
    Rope,
    TensorInfo,
    expected_tensors,
)

GPT_OSS_20B = DecoderSpec(
    family=Family.GPT_OSS,
    layers=24,
    hidden=2880,
    intermediate=2880,
    heads=64,
    kv_heads=8,
    head_dim=64,
    vocab=201_088,
    context_tokens=131_072,
    rope=Rope(150_000.0),
    norm_epsilon=1e-5,
    tied_head=False,
    windows=(128, 0) * 12,
    qkv_bias=True,
    output_bias=True,
    sinks=True,
    experts=ExpertSpec(32, 4),
)


def llama(hidden: int = 4096, intermediate: int = 11_008, layers: int = 32, heads: int = 32) -> DecoderSpec:
    """By default Llama 2 7B."""
    return DecoderSpec(
        family=Family.LLAMA,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=32_000,
        context_tokens=4096,
        rope=Rope(10_000.0),
        norm_epsilon=1e-5,
        tied_head=False,
        windows=(0,) * layers,
    )


def tensors_of(spec: DecoderSpec, kind: Kind) -> dict[str, TensorInfo]:
    """Every tensor; matrices are of the kind, experts MXFP4, vectors and routers BF16."""
    kinds = {Role.EXPERTS: Kind.MXFP4, Role.VECTOR: Kind.BF16, Role.ROUTER: Kind.BF16}
    return {
        name: TensorInfo(name, expected.shape, kinds.get(expected.role, kind))
        for name, expected in expected_tensors(spec).items()
    }
