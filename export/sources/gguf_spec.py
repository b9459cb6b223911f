"""The sizes of a llama or qwen2 model, out of a GGUF's metadata, and what its tensors are called elsewhere.

Keys, defaults and tensor names are those of llama.cpp (llama-arch.cpp, llama-model.cpp). What would change the
computation and has no place in `DecoderSpec` is refused: experts, partial rotary embeddings, scaled logits and so on.
llama.cpp rotates neighbouring pairs for the architecture `llama` and therefore interleaves the rows of q and k:
`rotary_heads` says of which tensors. Does not know where bytes lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log

from export.errors import SourceError
from export.sources.gguf_header import Metadata, Single, shown_value, single
from export.spec import (
    LARGEST_NUMBER,
    MAX_LAYERS,
    SMALLEST_NUMBER,
    DecoderSpec,
    Divided,
    Family,
    Linear,
    Rope,
    Scaling,
    TensorInfo,
    Yarn,
    check_limits,
)

#: Divisors of the rotary frequencies [head_dim / 2], by which Llama 3.1 and later are scaled.
ROPE_DIVISORS = "rope_freqs.weight"

_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"
_WHOLE = {_EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", _HEAD: "lm_head.weight"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# fmt: off
#: Keys after `<architecture>.` that change what is computed, and the value that changes nothing.
_NEUTRAL: Mapping[str, object] = {
    "expert_count": 0, "expert_used_count": 0, "nextn_predict_layers": 0, "pooling_type": 0,
    "logit_scale": 1, "residual_scale": 1, "embedding_scale": 1, "use_parallel_residual": False,
    "attn_logit_softcapping": 0, "final_logit_softcapping": 0,
    "attention.causal": True, "attention.clamp_kqv": 0, "attention.max_alibi_bias": 0,
    "attention.sliding_window_pattern": None, "attention.shared_kv_layers": 0,
    "attention.temperature_length": None, "attention.temperature_scale": None,
    "attention.scale": 0, "attention.output_scale": 1, "attention.value_scale": 1,
    "rope.dimension_sections": None, "rope.scaling.alpha": None,
    "rope.scaling.yarn_ext_factor": 1, "rope.scaling.yarn_attn_factor": 1, "rope.scaling.yarn_log_multiplier": 0,
}
# fmt: on


def read_spec(
    metadata: Metadata, tensors: Mapping[str, TensorInfo], divisors: tuple[float, ...] | None, where: str
) -> DecoderSpec:
    """Sizes of the model; `tensors` by GGUF's names, `divisors` the numbers of ROPE_DIVISORS if the file has it.

    Raises SourceError, beginning with `where`, for another architecture, a missing part or one that has no place here.
    """
    keys = _Keys(metadata, where)
    keys.refuse_what_has_no_place()
    embedding = tensors.get(_EMBEDDING)
    if embedding is None:
        raise SourceError(f"{where} has no tensor {_EMBEDDING!r}; it is not a whole model, fetch it again.")
    layers, hidden, heads = keys.size("block_count"), keys.size("embedding_length"), keys.size("attention.head_count")
    if layers > min(len(tensors), MAX_LAYERS):  # or a damaged count would make us expect tensors without end
        raise keys.unfit("block_count", layers, f"what {len(tensors)} tensors can be")
    head_dim = keys.size("attention.key_length", hidden // heads)
    context_tokens = keys.size("context_length")
    spec = DecoderSpec(
        family=keys.family,
        layers=layers,
        hidden=hidden,
        intermediate=keys.size("feed_forward_length"),
        heads=heads,
        kv_heads=keys.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=embedding.shape[0],
        context_tokens=context_tokens,
        rope=Rope(_base(keys), _scaling(keys, divisors, context_tokens)),
        norm_epsilon=keys.number("attention.layer_norm_rms_epsilon"),
        tied_head=_HEAD not in tensors,
        windows=(keys.count("attention.sliding_window"),) * layers,
        qkv_bias=keys.family is Family.QWEN2 or "blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
    )
    _check_heads(spec, keys, divisors)
    check_limits(spec, where)
    return spec


def hugging_face_name(name: str) -> str:
    """What `expected_tensors` calls a tensor of a GGUF; names that nobody expects stay as they are."""
    if name in _WHOLE:
        return _WHOLE[name]
    match name.split("."):
        case ["blk", layer, part, suffix] if part in _IN_LAYER:
            return f"model.layers.{layer}.{_IN_LAYER[part]}.{suffix}"
        case _:
            return name


def gguf_name(name: str) -> str:
    """What a GGUF calls a tensor; the inverse of `hugging_face_name`."""
    for theirs, ours in _WHOLE.items():
        if name == ours:
            return theirs
    match name.removeprefix("model.layers.").split("."):
        case [layer, *parts, suffix] if name.startswith("model.layers."):
            for part, ours in _IN_LAYER.items():
                if ".".join(parts) == ours:
                    return f"blk.{layer}.{part}.{suffix}"
    return name


def rotary_heads(spec: DecoderSpec, name: str) -> int:
    """How many heads' rows llama.cpp interleaved in a tensor (Hugging Face's name): 0 where it did not."""
    if spec.family is not Family.LLAMA:
        return 0
    match name.rsplit(".", 2)[-2:]:
        case ["q_proj", _]:
            return spec.heads
        case ["k_proj", _]:
            return spec.kv_heads
        case _:
            return 0


class _Keys:
    """The metadata of one architecture, by the part of the key behind its name."""

    def __init__(self, metadata: Metadata, where: str) -> None:
        self.where = where
        self._metadata = metadata
        architecture = single(metadata, "general.architecture", where)
        if not isinstance(architecture, str) or architecture not in (Family.LLAMA, Family.QWEN2):
            raise SourceError(
                f"{where} holds a model of the architecture {shown_value(architecture)}; of GGUF files this exporter "
                "reads llama and qwen2."
            )
        self.family = Family(architecture)

    def get(self, key: str) -> Single | None:
        """The one value of a key."""
        return single(self._metadata, f"{self.family}.{key}", self.where)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise self.unfit(key, value, "a positive whole number")
        return value

    def count(self, key: str) -> int:
        """A whole number, 0 if the key is missing."""
        return self.size(key) if self.get(key) not in (None, 0) else 0

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, normal in float32."""
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not _is_fit(value):
            raise self.unfit(key, value, "a positive number")
        return float(value)

    def unfit(self, key: str, value: object, wanted: str) -> SourceError:
        return SourceError(
            f"The key '{self.family}.{key}' of {self.where} is {shown_value(value)}, not {wanted}; "
            "take another file of this model."
        )

    def refuse_what_has_no_place(self) -> None:
        for key, neutral in _NEUTRAL.items():
            value = self._metadata.get(f"{self.family}.{key}")
            if value is not None and not (isinstance(value, (int, float)) and value == neutral):
                raise SourceError(
                    f"{self.where} has {self.family}.{key} = {shown_value(value)}, which the {self.family} graph does "
                    "not compute; export another model."
                )


def _is_fit(value: float) -> bool:
    return SMALLEST_NUMBER <= value <= LARGEST_NUMBER


def _base(keys: _Keys) -> float:
    base = keys.number("rope.freq_base", 10_000.0)
    if base <= 1:
        raise keys.unfit("rope.freq_base", base, "above 1")
    return base


def _scaling(keys: _Keys, divisors: tuple[float, ...] | None, context_tokens: int) -> Scaling | None:
    scaling = _scaling_by_keys(keys, context_tokens)
    if divisors is None:
        return scaling
    if scaling is not None:
        raise SourceError(
            f"{keys.where} scales its rotary embedding twice, by its keys and by {ROPE_DIVISORS!r}; "
            "take another file of this model."
        )
    return Divided(divisors)


def _scaling_by_keys(keys: _Keys, context_tokens: int) -> Scaling | None:
    has_factor = keys.get("rope.scaling.factor") is not None
    # An older name of the factor, from before there were kinds of scaling.
    factor = keys.number("rope.scaling.factor" if has_factor else "rope.scale_linear", 1.0)
    match keys.get("rope.scaling.type"):
        case "none":
            return None
        case None | "linear":
            return None if factor == 1 else Linear(factor)
        case "yarn":
            return Yarn(
                factor=factor,
                original_context_tokens=keys.size("rope.scaling.original_context_length", context_tokens),
                beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
                truncate=True,
                attention_factor=keys.number("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * log(max(factor, 1))),
            )
        case other:
            raise SourceError(
                f"{keys.where} scales its rotary embedding in the manner {shown_value(other)}; of GGUF files this "
                "exporter reads none, linear and yarn."
            )


def _check_heads(spec: DecoderSpec, keys: _Keys, divisors: tuple[float, ...] | None) -> None:
    rotated = keys.size("rope.dimension_count", spec.head_dim)
    value_dim = keys.size("attention.value_length", spec.head_dim)
    if rotated != spec.head_dim or value_dim != spec.head_dim or spec.head_dim % 2 or spec.heads % spec.kv_heads:
        raise SourceError(
            f"The attention of {keys.where} has {spec.heads} heads over {spec.kv_heads} of size {spec.head_dim} "
            f"(values: {value_dim}), {rotated} rotated; only whole heads of one even size, a multiple of the "
            "key heads, are computed: export another model."
        )
    if divisors is not None and (len(divisors) != spec.head_dim // 2 or not all(map(_is_fit, divisors))):
        raise SourceError(
            f"The tensor {ROPE_DIVISORS!r} of {keys.where} has not {spec.head_dim // 2} positive numbers; "
            "the file is damaged, fetch it again."
        )
