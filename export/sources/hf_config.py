"""config.json of a Hugging Face checkpoint -> DecoderSpec.

Keys, defaults and precedence: transformers 5.23 (`configuration_*.py` of each model, `modeling_rope_utils.py`), which
also reads what version 4 wrote; `rope_scaling` and `torch_dtype` are version 4's names. What would change a result and
cannot be expressed in a DecoderSpec is refused. Does not know files or tensors.
"""

from __future__ import annotations

from math import log
from typing import Annotated, NoReturn

import msgspec

from export.errors import SourceError
from export.sources.hf_json import decode_json, shown
from export.spec import (
    LARGEST_NUMBER,
    MAX_LAYERS,
    SMALLEST_NUMBER,
    DecoderSpec,
    ExpertSpec,
    Family,
    Linear,
    Llama3,
    Rope,
    Scaling,
    Yarn,
    check_limits,
)

#: model_type -> what `architectures` calls its language model, and the graph that builds it.
KNOWN = {
    "llama": ("LlamaForCausalLM", Family.LLAMA),
    "mistral": ("MistralForCausalLM", Family.LLAMA),
    "qwen2": ("Qwen2ForCausalLM", Family.QWEN2),
    "gpt_oss": ("GptOssForCausalLM", Family.GPT_OSS),
}

_Size = Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
_Layers = Annotated[int, msgspec.Meta(gt=0, le=MAX_LAYERS)]
_Positive = Annotated[float, msgspec.Meta(ge=SMALLEST_NUMBER, le=LARGEST_NUMBER)]
_Base = Annotated[float, msgspec.Meta(gt=1, le=LARGEST_NUMBER)]


class RopeConfig(msgspec.Struct):
    """`rope_parameters` (transformers 5) or `rope_scaling` (4)."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Base | None = None
    factor: _Positive | None = None
    original_max_position_embeddings: _Size | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    truncate: bool = True
    attention_factor: _Positive | None = None
    mscale: _Positive | None = None
    mscale_all_dim: _Positive | None = None
    partial_rotary_factor: float | None = None
    mrope_section: list[int] | None = None
    full_attention: dict[str, object] | None = None
    sliding_attention: dict[str, object] | None = None


class Quantization(msgspec.Struct):
    """`quantization_config`."""

    quant_method: str | None = None


class Config(msgspec.Struct):
    """config.json as far as it decides about the graph."""

    model_type: str
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Layers
    num_attention_heads: _Size
    vocab_size: _Size
    max_position_embeddings: _Size
    rms_norm_eps: _Positive
    architectures: list[str] | None = None
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool | None = None
    mlp_bias: bool = False
    rope_theta: _Base | None = None
    rope_scaling: RopeConfig | None = None
    rope_parameters: RopeConfig | None = None
    original_max_position_embeddings: _Size | None = None
    partial_rotary_factor: float | None = None
    sliding_window: _Size | msgspec.UnsetType | None = msgspec.UNSET
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    quantization_config: Quantization | None = None
    num_local_experts: _Size | None = None
    num_experts_per_tok: _Size | None = None
    experts_per_token: _Size | None = None
    swiglu_limit: _Positive = 7.0
    swiglu_alpha: _Positive = 1.702


class _Kind(msgspec.Struct):
    """Read first: an unknown kind need not have the other keys."""

    model_type: str
    architectures: list[str] | None = None


def read_config(data: bytes, where: str) -> Config:
    """Parse config.json; raises SourceError naming `where` if it is damaged or of an unknown architecture."""
    kind = decode_json(data, _Kind, where)
    architecture = kind.architectures[0] if kind.architectures else None
    known = KNOWN.get(kind.model_type)
    if known is None or architecture not in (known[0], None):
        names = ", ".join(f"{name} ({model_type})" for model_type, (name, _) in KNOWN.items())
        raise SourceError(
            f"{where} describes the architecture {shown(architecture)} ({shown(kind.model_type)}); "
            f"this exporter knows {names}."
        )
    return decode_json(data, Config, where)


def architecture_of(config: Config) -> str:
    """What the checkpoint calls its own kind."""
    return config.architectures[0] if config.architectures else KNOWN[config.model_type][0]


def read_spec(config: Config, where: str) -> DecoderSpec:
    """Sizes and options; raises SourceError for what the graphs would leave out."""
    _refuse_other_feed_forwards(config, where)
    _refuse_other_weights(config, where)
    heads, kv_heads = config.num_attention_heads, _kv_heads(config, where)
    spec = DecoderSpec(
        family=KNOWN[config.model_type][1],
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(config, where),
        vocab=config.vocab_size,
        context_tokens=config.max_position_embeddings,
        rope=_rope(config, where),
        norm_epsilon=config.rms_norm_eps,
        tied_head=config.tie_word_embeddings,
        windows=_windows(config, where),
        qkv_bias=_has_qkv_bias(config),
        output_bias=_has_output_bias(config),
        sinks=config.model_type == "gpt_oss",
        experts=_experts(config, where) if config.model_type == "gpt_oss" else None,
    )
    check_limits(spec, where)
    return spec


def _refuse_other_feed_forwards(config: Config, where: str) -> None:
    if config.hidden_act not in ("silu", "swish"):
        _refuse(where, f"the activation {shown(config.hidden_act)} (hidden_act), the graphs have 'silu'")
    if config.mlp_bias:
        _refuse(where, "biases in the feed-forward (mlp_bias), the graphs have none")


def _refuse_other_weights(config: Config, where: str) -> None:
    method = config.quantization_config.quant_method if config.quantization_config else None
    if config.model_type == "gpt_oss" and method != "mxfp4":
        raise SourceError(
            f"{where} does not say that the experts are MXFP4 (quantization_config.quant_method is {shown(method)}); "
            "a dequantised or requantised copy is not exported, take the checkpoint as it was published "
            "(openai/gpt-oss-20b)."
        )
    if config.model_type != "gpt_oss" and config.quantization_config is not None:
        raise SourceError(
            f"{where} says that the weights are quantised by {shown(method)}; export the model's original checkpoint "
            "(BF16, F16 or F32) or a GGUF file of it."
        )


def _kv_heads(config: Config, where: str) -> int:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads is None and config.model_type != "llama":
        raise SourceError(f"{where} does not say num_key_value_heads; fetch it again.")
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise SourceError(f"{where} has {heads} heads over {kv_heads} key heads, not a multiple; fetch it again.")
    return kv_heads


def _head_dim(config: Config, where: str) -> int:
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    if config.head_dim is None and config.hidden_size % config.num_attention_heads:
        raise SourceError(
            f"{where} has {config.num_attention_heads} heads over {config.hidden_size} numbers, not a multiple, and "
            "no head_dim; fetch it again."
        )
    if size % 2:
        _refuse(where, f"heads of {size} numbers (head_dim), a rotary embedding needs an even number")
    return size


def _has_qkv_bias(config: Config) -> bool:
    match config.model_type:
        case "qwen2":
            return True
        case "gpt_oss":
            return config.attention_bias is not False
        case "llama":
            return config.attention_bias is True
        case _:
            return False


def _has_output_bias(config: Config) -> bool:
    """transformers gives all four products a bias or none, but for qwen2."""
    return config.model_type != "qwen2" and _has_qkv_bias(config)


def _experts(config: Config, where: str) -> ExpertSpec:
    count, names = config.num_local_experts, (config.num_experts_per_tok, config.experts_per_token)
    per_token = set(names) - {None}
    if count is None or len(per_token) != 1:
        raise SourceError(
            f"{where} must say num_local_experts and num_experts_per_tok (also called experts_per_token), and each "
            "once; fetch it again."
        )
    (chosen,) = per_token
    if chosen is None or chosen > count:
        raise SourceError(f"{where} asks for {chosen} of {count} experts; fetch it again.")
    return ExpertSpec(count, chosen, config.swiglu_limit, config.swiglu_alpha)


def _windows(config: Config, where: str) -> tuple[int, ...]:
    """Positions that each layer sees, itself included; 0: all."""
    window = _window(config)
    types = config.layer_types or _usual_layer_types(config, window)
    layers = config.num_hidden_layers
    if len(types) != layers:
        raise SourceError(f"{where} has {len(types)} layer_types for num_hidden_layers {layers}; fetch it again.")
    if config.model_type in ("llama", "mistral") and types != _usual_layer_types(config, window):
        _refuse(where, "layer_types, which transformers does not heed in this architecture")
    return tuple(_window_of(kind, window, where) for kind in types)


def _window_of(kind: str, window: int | None, where: str) -> int:
    match kind:
        case "full_attention":
            return 0
        case "sliding_attention" if window is not None:
            return window
        case "sliding_attention":
            raise SourceError(f"{where} has layers with a window but no size for it (sliding_window); fetch it again.")
        case _:
            _refuse(where, f"a layer of {shown(kind)} (layer_types), the graphs have full_ and sliding_attention")


def _window(config: Config) -> int | None:
    """What `sliding_window` means, absent or not; None: the model has no layers with a window."""
    stated = None if isinstance(config.sliding_window, msgspec.UnsetType) else config.sliding_window
    match config.model_type:
        case "llama":
            return None
        case "qwen2":
            return stated if config.use_sliding_window else None
        case "mistral" if isinstance(config.sliding_window, msgspec.UnsetType):
            return 4096
        case _:
            return stated


def _usual_layer_types(config: Config, window: int | None) -> list[str]:
    """What an architecture does when config.json lists no layer_types."""
    layers = range(config.num_hidden_layers)
    match config.model_type:
        case "gpt_oss":
            sliding = [layer % 2 == 0 for layer in layers]
        case "qwen2":
            sliding = [window is not None and layer >= config.max_window_layers for layer in layers]
        case _:
            sliding = [window is not None for layer in layers]
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


def _rope(config: Config, where: str) -> Rope:
    rope = config.rope_scaling or config.rope_parameters
    if config.model_type == "gpt_oss" and rope is None:
        raise SourceError(f"{where} does not say how the rotary embedding is scaled (rope_scaling); fetch it again.")
    rope = rope or RopeConfig()
    if rope.full_attention is not None or rope.sliding_attention is not None:
        _refuse(where, "a rotary embedding for each type of layer, the graphs have one for all")
    if rope.mrope_section is not None:
        _refuse(where, "a rotary embedding over several axes (mrope_section), the graphs have one axis")
    if not {rope.partial_rotary_factor, config.partial_rotary_factor} <= {None, 1.0}:
        _refuse(where, "heads that are rotated in part (partial_rotary_factor), the graphs rotate whole heads")
    default_base = 150_000.0 if config.model_type == "gpt_oss" else 10_000.0
    return Rope(rope.rope_theta or config.rope_theta or default_base, _scaling(rope, config, where))


def _scaling(rope: RopeConfig, config: Config, where: str) -> Scaling | None:
    match rope.rope_type or rope.type or "default":
        case "default":
            return None
        case "linear":
            return Linear(_stated(rope.factor, "factor", where))
        case "llama3":
            return _llama3(rope, config, where)
        case "yarn":
            return _yarn(rope, config, where)
        case kind:
            _refuse(
                where,
                f"a rotary embedding that is scaled in the manner {shown(kind)}, the graphs have default, linear, "
                "llama3 and yarn",
            )


def _llama3(rope: RopeConfig, config: Config, where: str) -> Llama3:
    low = _stated(rope.low_freq_factor, "low_freq_factor", where)
    high = _stated(rope.high_freq_factor, "high_freq_factor", where)
    if not low < high:
        raise SourceError(f"{where} has a low_freq_factor {low} that is not below {high}; fetch it again.")
    return Llama3(_stated(rope.factor, "factor", where), low, high, _original_context(rope, config))


def _yarn(rope: RopeConfig, config: Config, where: str) -> Yarn:
    original = _original_context(rope, config)
    factor = rope.factor or config.max_position_embeddings / original
    return Yarn(
        factor=factor,
        original_context_tokens=original,
        beta_fast=rope.beta_fast or 32.0,
        beta_slow=rope.beta_slow or 1.0,
        truncate=rope.truncate,
        attention_factor=rope.attention_factor or _attention_factor(rope, factor, where),
    )


def _attention_factor(rope: RopeConfig, factor: float, where: str) -> float:
    """The paper's 0.1 ln(factor) + 1, or DeepSeek's ratio of two such terms."""

    def term(scale: float) -> float:
        return 0.1 * scale * log(factor) + 1.0 if factor > 1 else 1.0

    if (rope.mscale is None) != (rope.mscale_all_dim is None):
        _refuse(where, "only one of mscale and mscale_all_dim, which has no agreed meaning")
    if rope.mscale is None or rope.mscale_all_dim is None:
        return term(1.0)
    return term(rope.mscale) / term(rope.mscale_all_dim)


def _original_context(rope: RopeConfig, config: Config) -> int:
    """The context that the model was first trained with."""
    beside, inside = config.original_max_position_embeddings, rope.original_max_position_embeddings
    return beside or inside or config.max_position_embeddings


def _stated(value: float | None, key: str, where: str) -> float:
    if value is None:
        raise SourceError(f"{where} scales the rotary embedding but does not say {key!r}; fetch it again.")
    return value


def _refuse(where: str, what: str) -> NoReturn:
    raise SourceError(f"{where} asks for {what}; export another model.")
