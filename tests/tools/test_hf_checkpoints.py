from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.tools.hf_checkpoints import (
    CONTEXT,
    SIZES,
    Rope,
    load_reference,
    reference_logits,
    reference_step_by_step,
    write_llama,
    write_qwen2,
)
from tests.tools.safetensors_files import read_header, shard_of

IDS = [(37 * index) % 260 for index in range(60)]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def names(folder: Path) -> set[str]:
    """Every tensor's name in a checkpoint."""
    return {name for path in folder.glob("*.safetensors") for name in read_header(path)} - {"__metadata__"}


@pytest.mark.parametrize("write", [write_llama, write_qwen2])
def test_a_checkpoint_has_odd_sizes_and_sane_logits(write: Callable[..., Path], tmp_path: Path) -> None:
    logits = reference_logits(write(tmp_path), IDS)
    assert logits.shape == (60, SIZES["vocab_size"])
    assert 0.5 < logits.std() < 2
    np.testing.assert_allclose(reference_step_by_step(tmp_path, IDS, [7, 1, 52]), logits, rtol=0, atol=2e-5)


def test_a_tied_head_is_not_stored_and_an_untied_one_is(tmp_path: Path) -> None:
    assert HEAD in names(write_llama(tmp_path / "untied"))
    assert HEAD not in names(write_llama(tmp_path / "tied", tie_word_embeddings=True))
    assert HEAD not in names(write_qwen2(tmp_path / "qwen2"))


def test_qwen2_has_biases_on_queries_keys_and_values_that_are_felt(tmp_path: Path) -> None:
    attention = "model.layers.0.self_attn."
    biases = {attention + f"{name}_proj.bias" for name in "qkv"}
    assert {name for name in names(write_qwen2(tmp_path)) if name.startswith(attention) and "bias" in name} == biases
    model = load_reference(tmp_path)
    assert all(model.get_parameter(name).std() > 0.05 for name in biases)


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", "BF16"), ("f16", "F16"), ("f32", "F32")])
def test_tensors_are_stored_in_the_type_asked_for(dtype: str, stored: str, tmp_path: Path) -> None:
    write_llama(tmp_path, dtype=dtype)
    header = read_header(tmp_path / "model.safetensors")
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {stored}


def test_the_reference_is_fp32_whatever_is_stored(tmp_path: Path) -> None:
    model = load_reference(write_llama(tmp_path, dtype="f16"))
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}


def test_a_small_shard_size_makes_several_files_and_an_index_that_say_the_same(tmp_path: Path) -> None:
    whole, sharded = write_llama(tmp_path / "whole"), write_llama(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert EMBEDDING in read_header(shard_of(sharded, EMBEDDING))
    assert shard_of(whole, EMBEDDING) == whole / "model.safetensors"
    np.testing.assert_array_equal(reference_logits(sharded, IDS), reference_logits(whole, IDS))


def test_every_rope_turns_differently(tmp_path: Path) -> None:
    logits = {rope: reference_logits(write_llama(tmp_path / rope, rope=rope), IDS) for rope in get_args(Rope)}
    for one, other in zip(logits, list(logits)[1:], strict=False):
        assert np.abs(logits[one] - logits[other])[-1].max() > 0.1, (one, other)


@pytest.mark.parametrize("rope", get_args(Rope))
def test_both_spellings_of_a_configuration_mean_the_same(rope: Rope, tmp_path: Path) -> None:
    new = write_llama(tmp_path / "new", rope=rope, rope_theta=500_000.0)
    old = write_llama(tmp_path / "old", rope=rope, rope_theta=500_000.0, spelling="old")
    config = json.loads((old / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (500_000.0, "bfloat16")
    assert "rope_parameters" not in config
    np.testing.assert_array_equal(reference_logits(old, IDS), reference_logits(new, IDS))


def test_sizes_can_be_bent(tmp_path: Path) -> None:
    write_llama(tmp_path, head_dim=32, num_hidden_layers=1, attention_bias=True)
    assert read_header(tmp_path / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]["shape"] == [192, 96]
    assert "model.layers.0.self_attn.o_proj.bias" in names(tmp_path)
    assert "model.layers.1.input_layernorm.weight" not in names(tmp_path)


def test_the_tokenizer_has_fewer_entries_than_the_model_has_ids(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(write_llama(tmp_path) / "tokenizer.json"))
    assert tokenizer.get_vocab_size() < SIZES["vocab_size"]
    assert tokenizer.encode("<|im_start|>hell<|im_end|>").ids[0] == SIZES["bos_token_id"]
    assert tokenizer.encode("<|im_start|>hell<|im_end|>").tokens == ["<|im_start|>", "hell", "<|im_end|>"]


def test_the_chat_template_lies_in_the_tokenizers_configuration(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_llama(tmp_path))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hell"}], tokenize=False)
    assert (text, tokenizer.model_max_length) == ("<|im_start|>hell<|im_end|>", CONTEXT)
