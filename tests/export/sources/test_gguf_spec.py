from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import pytest

from export.errors import SourceError
from export.sources.gguf_spec import gguf_name, hugging_face_name, read_spec, rotary_heads
from export.spec import DecoderSpec, Divided, Family, Kind, Linear, Rope, TensorInfo, Yarn, expected_tensors
from tests.export.tiny_gguf import TinyLlama, tiny_qwen2

YARN = {"llama.rope.scaling.type": "yarn"}


def spec_of(model: TinyLlama, changes: dict[str, Any] | None = None) -> DecoderSpec:
    """What is read of a model's keys; a change to None takes a key away."""
    metadata = {name: value for name, value in (model.metadata | (changes or {})).items() if value is not None}
    return read_spec(metadata, infos(model), model.rope_divisors, "x.gguf")


def infos(model: TinyLlama) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, shape, model.kind(name)) for name, shape in model.shapes.items()}


def refusal(model: TinyLlama, changes: dict[str, Any] | None = None) -> str:
    with pytest.raises(SourceError) as caught:
        spec_of(model, changes)
    assert "x.gguf" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "model",
    [TinyLlama(), TinyLlama(tied_head=False), TinyLlama(qkv_bias=True), tiny_qwen2(), tiny_qwen2(tied_head=False)],
)
def test_sizes_are_read_and_name_every_tensor(model: TinyLlama) -> None:
    spec = replace(spec_of(model), norm_epsilon=model.spec.norm_epsilon)
    assert spec == model.spec
    shapes = {hugging_face_name(name): shape for name, shape in model.shapes.items()}
    assert shapes == {name: expected.shape for name, expected in expected_tensors(spec).items()}


def test_missing_keys_have_llama_cpps_defaults() -> None:
    spec = spec_of(TinyLlama(kv_heads=4), {"llama.attention.head_count_kv": None})
    assert (spec.kv_heads, spec.head_dim, spec.rope) == (4, 16, Rope(10_000.0))


def test_heads_can_have_a_size_of_their_own() -> None:
    sizes = {"llama.attention.key_length": 32, "llama.attention.value_length": 32, "llama.rope.dimension_count": 32}
    assert spec_of(TinyLlama(), sizes).head_dim == 32


def test_a_window_is_every_layers() -> None:
    assert spec_of(TinyLlama(), {"llama.attention.sliding_window": 16}).windows == (16, 16)
    assert spec_of(TinyLlama(), {"llama.attention.sliding_window": 0}).windows == (0, 0)


def test_a_bias_on_the_output_is_seen() -> None:
    model = TinyLlama(qkv_bias=True)
    model.shapes["blk.0.attn_output.bias"] = (64,)
    assert spec_of(model).output_bias


def test_a_qwen2_has_biases_even_if_the_file_has_none() -> None:
    assert spec_of(tiny_qwen2(qkv_bias=False)).qkv_bias  # and check_tensors misses them


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "linear", "factor": 4.0}, Linear(4.0)),
        ({"factor": 4.0}, Linear(4.0)),
        ({"factor": 1.0}, None),
        ({"type": "linear"}, None),
        ({"type": "yarn", "factor": 4.0}, Yarn(4.0, 64, 32.0, 1.0, True, 1 + 0.1 * log(4))),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 16, "attn_factor": 0.5, "yarn_ext_factor": 1.0},
            Yarn(4.0, 16, 32.0, 1.0, True, 0.5 * (1 + 0.1 * log(4))),
        ),
        (
            {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
            Yarn(4.0, 64, 16.0, 2.0, True, 1 + 0.1 * log(4)),
        ),
    ],
)
def test_a_scaled_rotary_embedding_is_read(changes: dict[str, Any], scaling: object) -> None:
    keys = {f"llama.rope.scaling.{key}": value for key, value in changes.items()}
    assert spec_of(TinyLlama(), keys | {"llama.rope.freq_base": 5e5}).rope == Rope(5e5, scaling)  # type: ignore[arg-type]


def test_the_old_name_of_a_factor_is_known() -> None:
    assert spec_of(TinyLlama(), {"llama.rope.scale_linear": 2.0}).rope.scaling == Linear(2.0)


def test_divisors_of_frequencies_are_a_scaling() -> None:
    divisors = (1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0)
    assert spec_of(TinyLlama(rope_divisors=divisors)).rope.scaling == Divided(divisors)
    twice = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0}
    assert "scales its rotary embedding twice" in refusal(TinyLlama(rope_divisors=divisors), twice)


@pytest.mark.parametrize("divisors", [(1.0,) * 7, (1.0,) * 7 + (0.0,), (1.0,) * 7 + (float("nan"),)])
def test_divisors_must_be_positive_and_one_a_pair(divisors: tuple[float, ...]) -> None:
    assert "'rope_freqs.weight' of x.gguf has not 8 positive numbers" in refusal(TinyLlama(rope_divisors=divisors))


def test_llama_cpp_interleaves_q_and_k_of_llamas_only() -> None:
    llama, qwen2 = TinyLlama().spec, tiny_qwen2().spec
    names = expected_tensors(replace(llama, qkv_bias=True))
    heads = {name.removeprefix("model.layers.0."): rotary_heads(llama, name) for name in names if ".0." in name}
    q, k = "self_attn.q_proj", "self_attn.k_proj"
    expected = {f"{q}.weight": 4, f"{q}.bias": 4, f"{k}.weight": 2, f"{k}.bias": 2}
    assert {name: count for name, count in heads.items() if count} == expected
    assert not any(rotary_heads(qwen2, name) for name in names)


def test_every_tensor_is_called_by_its_name_in_the_file() -> None:
    for name in TinyLlama(tied_head=False, qkv_bias=True).shapes:
        assert gguf_name(hugging_face_name(name)) == name
    for name in ("blk.0.attn_q_norm.weight", "x", "model.layers.0", "self_attn.q_proj.weight"):
        assert gguf_name(name) == name


def test_a_tensor_that_nobody_expects_keeps_its_name() -> None:
    for name in ("blk.0.ffn_gate_exps.weight", "blk.0.attn_q_norm.weight", "rope_factors_long.weight", "x", "blk.1"):
        assert hugging_face_name(name) == name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"general.architecture": "gpt-oss"},
            "architecture 'gpt-oss'; of GGUF files this exporter reads llama and qwen2",
        ),
        ({"general.architecture": None}, "architecture None"),
        ({"llama.block_count": None}, "'llama.block_count' of x.gguf is None, not a positive whole number"),
        ({"llama.block_count": -1}, "'llama.block_count' of x.gguf is -1"),
        ({"llama.block_count": 1 << 30}, "'llama.block_count' of x.gguf is 1073741824, not what 20 tensors can be"),
        ({"llama.context_length": (1 << 31) - 1}, "a context of 2147483647 tokens, more than this exporter's limit of"),
        ({"llama.context_length": 47}, "a context of 47 tokens; a release needs at least 48"),
        ({"llama.attention.head_count": "4"}, "'llama.attention.head_count' of x.gguf is '4'"),
        ({"llama.attention.head_count": True}, "'llama.attention.head_count' of x.gguf is True"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "is 0.0, not a positive number"),
        ({"llama.rope.freq_base": float("inf")}, "is inf, not a positive number"),
        ({"llama.rope.freq_base": 1.0}, "'llama.rope.freq_base' of x.gguf is 1.0, not above 1"),
        ({"llama.attention.layer_norm_rms_epsilon": 1e308}, "is 1e+308, not a positive number"),
        ({"llama.rope.scaling.factor": 1e-320}, "'llama.rope.scaling.factor' of x.gguf is 1e-320, not"),
        (YARN | {"llama.rope.scaling.yarn_beta_slow": 1e-308}, "yarn_beta_slow' of x.gguf is 1e-308, not"),
        (YARN | {"llama.rope.scaling.yarn_beta_fast": 1e308}, "yarn_beta_fast' of x.gguf is 1e+308, not"),
        (YARN | {"llama.rope.scaling.attn_factor": 1e30}, "an attention_factor of 1e+30, which is not from"),
        ({"llama.attention.head_count_kv": 3}, "4 heads over 3"),
        ({"llama.rope.dimension_count": 8}, "8 rotated"),
        ({"llama.attention.value_length": 32}, "(values: 32)"),
        ({"llama.rope.scaling.type": "longrope"}, "in the manner 'longrope'"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8, which the llama graph does not compute"),
        ({"llama.attention.causal": False}, "llama.attention.causal = False"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale = 0.5"),
        ({"llama.attention.sliding_window_pattern": 6}, "sliding_window_pattern = 6"),
        ({"llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5"),
    ],
)
def test_what_the_graph_would_leave_out_is_refused(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(TinyLlama(), changes)


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        *("llama.block_count", "llama.attention.head_count", "llama.attention.sliding_window"),
        *("llama.rope.scaling.type", "llama.rope.freq_base", "llama.rope.scaling.factor", "llama.rope.dimension_count"),
    ],
)
@pytest.mark.parametrize("values", [np.array([1, 2, 3], np.int32), np.array([0]), ["a", "b"]])
def test_an_array_where_one_value_is_meant_is_refused(key: str, values: Any) -> None:
    assert f"The key '{key}' of x.gguf holds a list of {len(values)}, where one value is meant" in refusal(
        TinyLlama(), {key: values}
    )


def test_an_array_that_no_graph_computes_is_refused() -> None:
    changes = {"llama.rope.dimension_sections": np.array([1, 2])}
    assert "llama.rope.dimension_sections = a list of 2, which the llama graph" in refusal(TinyLlama(), changes)


@pytest.mark.parametrize("changes", [{"llama.expert_count": 0}, {"llama.logit_scale": 1.0}, {"llama.vocab_size": 5}])
def test_keys_that_change_nothing_are_no_hindrance(changes: dict[str, Any]) -> None:
    assert spec_of(TinyLlama(), changes) == spec_of(TinyLlama())


def test_a_model_without_an_embedding_is_refused() -> None:
    model = TinyLlama()
    del model.shapes["token_embd.weight"]
    assert "no tensor 'token_embd.weight'" in refusal(model)


def test_the_kinds_of_a_tiny_model_are_what_it_says() -> None:
    assert TinyLlama().kind("blk.0.attn_q.weight") is Kind.Q4_1
    assert TinyLlama().architecture is Family.LLAMA
