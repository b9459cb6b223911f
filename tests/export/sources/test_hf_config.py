"""config.json: what published models say, as transformers understands it; everything else is refused."""

from __future__ import annotations

import json
from math import log
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import SourceError
from export.graphs.rope import frequencies, rotary_tables
from export.sources.hf_config import architecture_of, read_config, read_spec
from export.spec import LARGEST_NUMBER, SMALLEST_NUMBER, DecoderSpec, ExpertSpec, Family, Llama3, Rope, Yarn
from tests.tools.gpt_oss_checkpoint import FULL, model_config

WHERE = "model/config.json"

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131_072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128_256,
}
"""Llama 3.2 1B."""

MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "max_position_embeddings": 32_768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32_000,
}
"""Mistral 7B v0.1."""

QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32_768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1_000_000.0,
    "sliding_window": 32_768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151_936,
}
"""Qwen 2.5 0.5B."""

GPT_OSS = model_config(FULL)

MODELS = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "gpt_oss": GPT_OSS}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}


def spec_of(config: dict[str, Any], **changes: Any) -> DecoderSpec:
    """The description of a model whose config.json has these keys; ... takes one away."""
    changed = {key: value for key, value in (config | changes).items() if value is not ...}
    return read_spec(read_config(json.dumps(changed).encode(), WHERE), WHERE)


def refused(words: str, config: dict[str, Any], **changes: Any) -> None:
    with pytest.raises(SourceError, match=words) as refusal:
        spec_of(config, **changes)
    assert WHERE in refusal.value.message


def test_gpt_oss() -> None:
    assert spec_of(GPT_OSS) == DecoderSpec(
        family=Family.GPT_OSS,
        layers=24,
        hidden=2880,
        intermediate=2880,
        heads=64,
        kv_heads=8,
        head_dim=64,
        vocab=201_088,
        context_tokens=131_072,
        rope=Rope(150_000.0, Yarn(32.0, 4096, 32.0, 1.0, truncate=False, attention_factor=0.1 * log(32) + 1)),
        norm_epsilon=1e-5,
        tied_head=False,
        windows=(128, 0) * 12,
        qkv_bias=True,
        output_bias=True,
        sinks=True,
        experts=ExpertSpec(32, 4, 7.0, 1.702),
    )


def test_a_llama() -> None:
    assert spec_of(LLAMA) == DecoderSpec(
        family=Family.LLAMA,
        layers=16,
        hidden=2048,
        intermediate=8192,
        heads=32,
        kv_heads=8,
        head_dim=64,
        vocab=128_256,
        context_tokens=131_072,
        rope=Rope(500_000.0, Llama3(32.0, 1.0, 4.0, 8192)),
        norm_epsilon=1e-5,
        tied_head=True,
        windows=(0,) * 16,
    )


def test_a_mistral_is_a_llama_with_windows() -> None:
    spec = spec_of(MISTRAL)
    assert (spec.family, spec.windows, spec.head_dim) == (Family.LLAMA, (4096,) * 32, 128)
    assert spec_of(MISTRAL, sliding_window=None).windows == (0,) * 32


def test_a_qwen2_has_biases_where_the_others_have_none() -> None:
    spec = spec_of(QWEN2)
    assert (spec.family, spec.qkv_bias, spec.output_bias) == (Family.QWEN2, True, False)
    assert (spec.tied_head, spec.windows, spec.rope) == (True, (0,) * 24, Rope(1_000_000.0))


class TestDefaults:
    def test_a_llama_without_key_heads_has_one_for_each_head(self) -> None:
        assert spec_of(LLAMA, num_key_value_heads=...).kv_heads == 32

    def test_a_head_has_its_share_of_the_hidden_size(self) -> None:
        assert spec_of(LLAMA, head_dim=...).head_dim == spec_of(LLAMA, head_dim=None).head_dim == 64

    def test_tables_are_not_tied_unless_it_says_so(self) -> None:
        assert not spec_of(LLAMA, tie_word_embeddings=...).tied_head

    def test_biases_of_a_llama_are_on_all_four_products(self) -> None:
        spec = spec_of(LLAMA, attention_bias=True)
        assert (spec.qkv_bias, spec.output_bias) == (True, True)

    def test_gpt_oss_has_biases_unless_it_says_no(self) -> None:
        assert spec_of(GPT_OSS, attention_bias=...).output_bias
        assert not spec_of(GPT_OSS, attention_bias=False).qkv_bias

    @pytest.mark.parametrize("key", ["experts_per_token", "num_experts_per_tok"])
    def test_either_name_of_the_experts_per_token_will_do(self, key: str) -> None:
        assert spec_of(GPT_OSS, **{key: ...}).experts == ExpertSpec(32, 4)

    def test_the_limit_of_the_experts_is_theirs(self) -> None:
        assert spec_of(GPT_OSS, swiglu_limit=5.0).experts == ExpertSpec(32, 4, 5.0)

    def test_the_architecture_is_what_the_checkpoint_calls_itself(self) -> None:
        assert architecture_of(read_config(json.dumps(MISTRAL).encode(), WHERE)) == "MistralForCausalLM"
        nameless = {key: value for key, value in MISTRAL.items() if key != "architectures"}
        assert architecture_of(read_config(json.dumps(nameless).encode(), WHERE)) == "MistralForCausalLM"


ROPES: list[dict[str, Any]] = [
    {"rope_scaling": None},
    {"rope_scaling": ..., "rope_theta": ...},
    {"rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": LLAMA["rope_scaling"]},
    {"rope_scaling": YARN},
    {"rope_scaling": YARN | {"factor": 8.0, "type": "yarn", "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}},
    {"rope_scaling": YARN | {"attention_factor": 1.25}},
    {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}},
    {"rope_scaling": YARN | {"factor": 0.5}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 8192}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 4096},
    {"rope_scaling": ..., "rope_theta": ..., "rope_parameters": YARN | {"rope_theta": 20_000.0}},
    {"rope_scaling": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
    {"rope_scaling": ..., "rope_theta": 30_000.0, "rope_parameters": {"rope_type": "default"}},
]


class TestAsTransformersUnderstandsIt:
    """transformers takes seconds to import, so only these tests do."""

    @pytest.mark.parametrize("changes", ROPES)
    @pytest.mark.parametrize("model", ["llama", "qwen2"])
    def test_every_spelling_of_a_rope_turns_alike(self, model: str, changes: dict[str, Any]) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        spec = spec_of(MODELS[model], **changes)
        theirs = LlamaRotaryEmbedding(self.config_of(MODELS[model], **changes))
        np.testing.assert_allclose(frequencies(spec.rope, spec.head_dim), theirs.inv_freq.double().numpy(), rtol=2e-6)
        assert rotary_tables(spec.rope, spec.head_dim, 1)[0][0, 0] == pytest.approx(theirs.attention_scaling, rel=1e-7)

    @pytest.mark.parametrize(
        ("model", "changes"),
        [
            ("qwen2", {}),
            ("qwen2", {"use_sliding_window": True, "sliding_window": 100}),
            ("qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0}),
            ("qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 99}),
            ("qwen2", {"use_sliding_window": True, "sliding_window": None}),
            ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 12}),
            ("gpt_oss", {}),
            ("gpt_oss", {"layer_types": ...}),
            ("gpt_oss", {"layer_types": None, "num_hidden_layers": 3}),
            ("gpt_oss", {"layer_types": ["full_attention"] * 24, "sliding_window": None}),
        ],
    )
    def test_every_layer_sees_as_far(self, model: str, changes: dict[str, Any]) -> None:
        theirs = self.config_of(MODELS[model], **changes)
        windows = [theirs.sliding_window if kind == "sliding_attention" else 0 for kind in theirs.layer_types]
        assert list(spec_of(MODELS[model], **changes).windows) == windows

    @pytest.mark.parametrize("changes", [{}, {"sliding_window": ...}, {"sliding_window": None}, {"sliding_window": 7}])
    def test_all_layers_of_a_mistral_see_as_far(self, changes: dict[str, Any]) -> None:
        theirs = self.config_of(MISTRAL, **changes)
        assert set(spec_of(MISTRAL, **changes).windows) == {theirs.sliding_window or 0}

    @pytest.mark.parametrize("model", MODELS)
    def test_sizes_are_the_same(self, model: str) -> None:
        theirs, spec = self.config_of(MODELS[model]), spec_of(MODELS[model])
        assert (spec.heads, spec.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
        assert spec.head_dim == getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert (spec.norm_epsilon, spec.tied_head) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)

    @staticmethod
    def config_of(config: dict[str, Any], **changes: Any) -> Any:
        from transformers import AutoConfig

        changed = {key: value for key, value in (config | changes).items() if value is not ...}
        # A copy, because transformers completes the dictionaries that it is given.
        changed = json.loads(json.dumps(changed))
        return AutoConfig.for_model(changed.pop("model_type"), **changed)


class TestWhatNoGraphDoes:
    def test_an_unknown_architecture_is_told_the_known_ones(self) -> None:
        config = {"model_type": "gemma3", "architectures": ["Gemma3ForCausalLM"]}
        with pytest.raises(SourceError, match=r"'Gemma3ForCausalLM' .* knows LlamaForCausalLM \(llama\), Mistral.*Gpt"):
            read_config(json.dumps(config).encode(), WHERE)

    def test_a_known_kind_with_another_head_is_unknown(self) -> None:
        refused("'LlamaForSequenceClassification'", LLAMA, architectures=["LlamaForSequenceClassification"])

    @pytest.mark.parametrize(
        ("model", "changes", "words"),
        [
            ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
            ("llama", {"mlp_bias": True}, "mlp_bias"),
            ("llama", {"partial_rotary_factor": 0.5}, "rotated in part"),
            ("llama", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "rotated in part"),
            ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "in the manner 'dynamic'"),
            ("llama", {"rope_scaling": {"rope_type": "longrope", "long_factor": [1]}}, "in the manner 'longrope'"),
            ("llama", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "mrope_section"),
            ("llama", {"rope_scaling": {"rope_type": "linear"}}, "does not say 'factor'"),
            ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "does not say 'low_freq_factor'"),
            ("llama", {"rope_scaling": LLAMA["rope_scaling"] | {"low_freq_factor": 4.0}}, "not below 4"),
            ("llama", {"rope_scaling": YARN | {"mscale": 1.0}}, "only one of mscale and mscale_all_dim"),
            ("llama", {"rope_scaling": {"full_attention": YARN}}, "for each type of layer"),
            ("llama", {"layer_types": ["sliding_attention"] * 16}, "layer_types, which transformers does not heed"),
            ("mistral", {"layer_types": ["full_attention"] * 32}, "layer_types, which transformers does not heed"),
            ("qwen2", {"layer_types": ["full_attention"] * 3}, "3 layer_types for num_hidden_layers 24"),
            ("qwen2", {"layer_types": ["linear_attention"] * 24}, "'linear_attention'"),
            ("qwen2", {"layer_types": ["sliding_attention"] * 24}, "a window but no size"),
            ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by 'gptq'"),
            ("qwen2", {"quantization_config": {"quant_method": "awq"}}, "quantised by 'awq'"),
            ("llama", {"quantization_config": {"quant_method": "mxfp4"}}, "quantised by 'mxfp4'"),
            ("gpt_oss", {"quantization_config": ...}, "does not say that the experts are MXFP4 .*openai/gpt-oss-20b"),
            ("gpt_oss", {"quantization_config": {"quant_method": "bitsandbytes"}}, "is 'bitsandbytes'"),
            ("gpt_oss", {"rope_scaling": ...}, "does not say how the rotary embedding is scaled"),
            ("gpt_oss", {"experts_per_token": 5}, "num_local_experts and num_experts_per_tok"),
            ("gpt_oss", {"num_local_experts": ...}, "num_local_experts and num_experts_per_tok"),
            ("gpt_oss", {"num_local_experts": 2}, "4 of 2 experts"),
        ],
    )
    def test_what_would_be_left_out_is_refused(self, model: str, changes: dict[str, Any], words: str) -> None:
        refused(words, MODELS[model], **changes)


class TestDamage:
    @pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 9999, b'{"model_type": 3}'])
    def test_what_is_no_config_is_refused(self, data: bytes) -> None:
        with pytest.raises(SourceError, match=r"model/config.json cannot be read"):
            read_config(data, WHERE)

    def test_a_key_is_named_as_it_stands_in_the_file(self) -> None:
        refused(r"cannot be read \(num_hidden_layers: Expected `int` <= 1024\); ", LLAMA, num_hidden_layers=10**9)
        refused(r"\(rope_scaling.factor: Expected `float", LLAMA, rope_scaling={"factor": "8"})

    @pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"])
    @pytest.mark.parametrize("value", [0, -1, 1 << 31, 10**40, 2.5, "7", None, True, [], ...])
    def test_a_size_that_is_none_is_named(self, key: str, value: Any) -> None:
        refused(key, LLAMA, **{key: value})

    def test_a_depth_that_no_model_has_is_not_described(self) -> None:
        refused("num_hidden_layers", LLAMA, num_hidden_layers=1_000_000_000)

    @pytest.mark.parametrize(("tokens", "head_dim"), [(1 << 21, 64), (1 << 20, 256)])
    def test_a_context_whose_tables_would_never_end_is_refused(self, tokens: int, head_dim: int) -> None:
        assert spec_of(LLAMA, max_position_embeddings=tokens, head_dim=head_dim).context_tokens == tokens
        words = rf"says a context of {tokens + 1} tokens, more than this exporter's limit of {tokens}; lower it"
        refused(words, LLAMA, max_position_embeddings=tokens + 1, head_dim=head_dim)
        refused("says a context of 2147483647 tokens", LLAMA, max_position_embeddings=(1 << 31) - 1)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("rope_theta", 1.0),
            ("factor", 1e-320),
            ("beta_slow", 1e-308),
            ("beta_fast", 1e308),
            ("attention_factor", 1e300),
            ("attention_factor", 1e30),
            ("mscale", 1e-320),
        ],
    )
    def test_a_number_of_the_rope_that_no_table_can_hold_is_refused(self, key: str, value: float) -> None:
        refused(key, LLAMA, rope_scaling=YARN | {key: value})

    @pytest.mark.parametrize("factor", [LARGEST_NUMBER, SMALLEST_NUMBER])
    @pytest.mark.parametrize("base", [1 + 1e-15, LARGEST_NUMBER])
    @pytest.mark.parametrize("beta", [LARGEST_NUMBER, SMALLEST_NUMBER])
    @pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
    def test_the_outermost_numbers_give_finite_tables(self, kind: str, factor: float, base: float, beta: float) -> None:
        rope = {"rope_type": kind, "factor": factor, "beta_fast": beta, "beta_slow": beta, "attention_factor": 65_504.0}
        rope |= {"low_freq_factor": SMALLEST_NUMBER, "high_freq_factor": beta + 2 * SMALLEST_NUMBER}
        spec = spec_of(LLAMA, rope_scaling=rope, rope_theta=base, max_position_embeddings=100)
        tables = rotary_tables(spec.rope, spec.head_dim, spec.context_tokens)
        assert all(np.isfinite(table.astype(np.float16)).all() for table in tables)

    @pytest.mark.parametrize(("model", "key"), [("llama", "rms_norm_eps"), ("gpt_oss", "swiglu_limit")])
    @pytest.mark.parametrize("value", [1e308, 1e-320])
    def test_a_number_that_float32_cannot_hold_is_refused(self, model: str, key: str, value: float) -> None:
        refused(key, MODELS[model], **{key: value})

    def test_a_context_too_short_to_try_a_release_out_is_refused(self) -> None:
        assert spec_of(LLAMA, max_position_embeddings=48).context_tokens == 48
        refused("a context of 47 tokens; a release needs at least 48", LLAMA, max_position_embeddings=47)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"num_key_value_heads": 5}, "32 heads over 5 key heads"),
            ({"head_dim": None, "hidden_size": 2050}, "32 heads over 2050 numbers"),
            ({"head_dim": 63}, "heads of 63 numbers"),
            ({"rms_norm_eps": 0}, "rms_norm_eps"),
            ({"rope_theta": -1.0}, "rope_theta"),
        ],
    )
    def test_sizes_that_do_not_fit_are_named(self, changes: dict[str, Any], words: str) -> None:
        refused(words, LLAMA, **changes)

    def test_a_mistral_must_say_its_key_heads(self) -> None:
        refused("does not say num_key_value_heads", MISTRAL, num_key_value_heads=...)

    @settings(max_examples=300, deadline=None)
    @given(
        model=st.sampled_from(list(MODELS)),
        key=st.sampled_from(sorted({key for config in MODELS.values() for key in config})),
        value=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=5,
        ),
    )
    def test_any_value_of_any_key_gives_a_description_or_a_refusal(self, model: str, key: str, value: Any) -> None:
        try:
            spec = spec_of(MODELS[model], **{key: value})
        except SourceError as refusal:
            assert WHERE in refusal.message
        else:
            assert len(spec.windows) == spec.layers
