"""What a decoder is made of: sizes, rotary embedding, experts, and the tensors that such a model must have.

One description for every source: readers make it out of config.json or a GGUF's metadata, graph builders read nothing
else. Tensor names are those of Hugging Face's checkpoints; readers translate other names and orders, so that a name
means the same rows everywhere. Anything that a graph would silently leave out is refused here.
Does not know files, bytes or ONNX.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from export.errors import SourceError

#: What is read when a release is tried out.
MIN_CONTEXT_TOKENS = 48
#: Beyond any model's; the rotary tables are as long as the context, and both together have at most so many bytes.
MAX_CONTEXT_TOKENS = 1 << 21
MAX_ROTARY_BYTES = 1 << 30
#: More than any model has; a description is as long as its model is deep.
MAX_LAYERS = 1024
#: Every number of a description must be one that a graph can hold: normal in float32.
SMALLEST_NUMBER, LARGEST_NUMBER = 2.0**-126, (2 - 2.0**-23) * 2.0**127
#: The rotary tables hold cosines and sines times a factor, at worst in float16.
MAX_ATTENTION_FACTOR = 65_504.0

_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Family(StrEnum):
    """Graph builders by name; the manifest's `family`."""

    LLAMA = "llama"
    QWEN2 = "qwen2"
    GPT_OSS = "gpt_oss"


class Kind(StrEnum):
    """How a source tensor's numbers are stored. MXFP4: codes and scales, two tensors in the file, one here."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    Q8_0 = "Q8_0"
    Q4_K = "Q4_K"
    Q6_K = "Q6_K"
    MXFP4 = "MXFP4"

    @property
    def is_float(self) -> bool:
        """Whether every weight is stored for itself."""
        return self in (Kind.F32, Kind.F16, Kind.BF16)


class Role(StrEnum):
    """What a tensor is for; recipes choose a form by role and kind."""

    EMBEDDING = "embedding"
    HEAD = "head"
    ATTENTION = "attention"
    FEED_FORWARD = "feed_forward"
    EXPERTS = "experts"
    ROUTER = "router"
    VECTOR = "vector"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: shape in numpy order (rows before columns)."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def columns(self) -> int:
        """Length of a row: the last axis."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows when all axes but the last are taken together; a vector has one element a row."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows if len(self.shape) > 1 else self.shape[0]


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Low frequencies divided by `factor`, high ones kept, a smooth passage between (Llama 3.1)."""

    factor: float
    low_factor: float
    high_factor: float
    original_context_tokens: int


@dataclass(frozen=True)
class Yarn:
    """NTK by parts (arXiv 2309.00071). attention_factor scales cosines and sines; truncate rounds the ramp's ends."""

    factor: float
    original_context_tokens: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float


@dataclass(frozen=True)
class Divided:
    """Each frequency divided by its own number [head_dim / 2]: how a GGUF carries a scaling it has worked out."""

    divisors: tuple[float, ...]


Scaling = Linear | Llama3 | Yarn | Divided


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of whole heads, halves rotated (element i with i + head_dim / 2)."""

    base: float
    scaling: Scaling | None = None


@dataclass(frozen=True)
class ExpertSpec:
    """A mixture of `count` feed-forwards, `per_token` of them at a time, clamped SwiGLU.

    gate * sigmoid(alpha * gate) * (up + 1), gate at most `limit`, up within +-limit; gate and up rows alternate.
    """

    count: int
    per_token: int
    limit: float = 7.0
    alpha: float = 1.702


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes of one model.

    windows: per layer the positions that attention sees, itself included; 0: all of them. qkv_bias, output_bias: the
    attention's products have biases; sinks: each head has a learned sink. experts None: a dense feed-forward.
    """

    family: Family
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context_tokens: int
    rope: Rope
    norm_epsilon: float
    tied_head: bool
    windows: tuple[int, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    experts: ExpertSpec | None = None


@dataclass(frozen=True)
class Expected:
    """A tensor that a model must have."""

    shape: tuple[int, ...]
    role: Role


def expected_tensors(spec: DecoderSpec) -> dict[str, Expected]:
    """Every tensor of such a model by name."""
    tensors = {
        "model.embed_tokens.weight": Expected((spec.vocab, spec.hidden), Role.EMBEDDING),
        "model.norm.weight": Expected((spec.hidden,), Role.VECTOR),
    }
    if not spec.tied_head:
        tensors["lm_head.weight"] = Expected((spec.vocab, spec.hidden), Role.HEAD)
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        for part in (_norms(spec), _attention(spec), _feed_forward(spec)):
            tensors |= {prefix + name: expected for name, expected in part.items()}
    return tensors


def check_limits(spec: DecoderSpec, where: str) -> None:
    """Raise SourceError, naming `where`, for what no release can have.

    A context that is endless or too short to try out, rotary tables that are not finite.
    """
    scaling = spec.rope.scaling
    if isinstance(scaling, Yarn) and not SMALLEST_NUMBER <= scaling.attention_factor <= MAX_ATTENTION_FACTOR:
        raise SourceError(
            f"{where} scales the rotary embedding by an attention_factor of {scaling.attention_factor:g}, which is not "
            f"from {SMALLEST_NUMBER:.3g} to {MAX_ATTENTION_FACTOR:g}; correct it there, or fetch it again."
        )
    rotary_bytes_per_token = 2 * (spec.head_dim // 2) * 4
    most = min(MAX_CONTEXT_TOKENS, MAX_ROTARY_BYTES // rotary_bytes_per_token)
    if spec.context_tokens > most:
        raise SourceError(
            f"{where} says a context of {spec.context_tokens} tokens, more than this exporter's limit of {most}; "
            "lower it there, or export another model."
        )
    if spec.context_tokens < MIN_CONTEXT_TOKENS:
        raise SourceError(
            f"{where} says a context of {spec.context_tokens} tokens; a release needs at least {MIN_CONTEXT_TOKENS}: "
            "export another model."
        )


def check_tensors(
    spec: DecoderSpec, tensors: Mapping[str, TensorInfo], where: str, called: Callable[[str], str] = str
) -> None:
    """Raise SourceError unless `tensors` are exactly what the spec asks for.

    `where` names the checkpoint; `called`: a tensor's name -> what the checkpoint's own files call it.
    """
    _check_layers(spec, tensors, where)
    expected = expected_tensors(spec)
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise SourceError(
            f"{where} has {len(unknown)} tensors that the {spec.family} graph does not use "
            f"(first: {called(unknown[0])!r}); the model is of another kind, export it with a version that knows them."
        )
    for name, wanted in expected.items():
        found = tensors.get(name)
        if found is None:
            raise SourceError(
                f"{where} has no tensor {called(name)!r}; it is not a whole {spec.family} model, fetch it again."
            )
        if found.shape != wanted.shape:
            raise SourceError(
                f"The tensor {called(name)!r} of {where} is {found.shape}, its configuration says {wanted.shape}; "
                "one of the two is damaged, fetch it again."
            )
        _check_kind(found, wanted.role, where, called(name))


def _check_layers(spec: DecoderSpec, tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Before a list as long as a hostile configuration says is made."""
    found = {match[1] for name in tensors if (match := _IN_LAYER.match(name))}
    if len(found) != spec.layers:
        raise SourceError(
            f"The number of layers of {where} is {len(found)} by its tensors and {spec.layers} by its configuration; "
            "check the latter (num_hidden_layers in config.json, block_count in a GGUF)."
        )


def _check_kind(tensor: TensorInfo, role: Role, where: str, called: str) -> None:
    is_mxfp4 = tensor.kind is Kind.MXFP4
    if is_mxfp4 is not (role is Role.EXPERTS):
        raise SourceError(
            f"The tensor {called!r} of {where} is stored as {tensor.kind}; experts must be MXFP4 and nothing else "
            "may be: take the checkpoint as it was published."
        )
    if role in (Role.VECTOR, Role.ROUTER) and not tensor.kind.is_float:
        raise SourceError(
            f"The tensor {called!r} of {where} is stored as {tensor.kind}, a float type was expected; "
            "requantise the model."
        )


def _norms(spec: DecoderSpec) -> dict[str, Expected]:
    norm = Expected((spec.hidden,), Role.VECTOR)
    return {"input_layernorm.weight": norm, "post_attention_layernorm.weight": norm}


def _attention(spec: DecoderSpec) -> dict[str, Expected]:
    query, key_value = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    rows = {"q_proj": query, "k_proj": key_value, "v_proj": key_value}
    tensors = {f"self_attn.{name}.weight": Expected((size, spec.hidden), Role.ATTENTION) for name, size in rows.items()}
    tensors["self_attn.o_proj.weight"] = Expected((spec.hidden, query), Role.ATTENTION)
    if spec.qkv_bias:
        tensors |= {f"self_attn.{name}.bias": Expected((size,), Role.VECTOR) for name, size in rows.items()}
    if spec.output_bias:
        tensors["self_attn.o_proj.bias"] = Expected((spec.hidden,), Role.VECTOR)
    if spec.sinks:
        tensors["self_attn.sinks"] = Expected((spec.heads,), Role.VECTOR)
    return tensors


def _feed_forward(spec: DecoderSpec) -> dict[str, Expected]:
    hidden, inner = spec.hidden, spec.intermediate
    if spec.experts is None:
        return {
            "mlp.gate_proj.weight": Expected((inner, hidden), Role.FEED_FORWARD),
            "mlp.up_proj.weight": Expected((inner, hidden), Role.FEED_FORWARD),
            "mlp.down_proj.weight": Expected((hidden, inner), Role.FEED_FORWARD),
        }
    count = spec.experts.count
    return {
        "mlp.router.weight": Expected((count, hidden), Role.ROUTER),
        "mlp.router.bias": Expected((count,), Role.VECTOR),
        "mlp.experts.gate_up_proj": Expected((count, 2 * inner, hidden), Role.EXPERTS),
        "mlp.experts.gate_up_proj_bias": Expected((count, 2 * inner), Role.VECTOR),
        "mlp.experts.down_proj": Expected((count, hidden, inner), Role.EXPERTS),
        "mlp.experts.down_proj_bias": Expected((count, hidden), Role.VECTOR),
    }
