"""transformers at both ends: it writes tiny Hugging Face folders of the llama family, and says what a folder means.

The folders are what people have on disk: config.json, safetensors (sharded on request), tokenizer and chat template,
made by transformers itself. The logits are the yardstick that the exporter's graphs are held to. Knows nothing of
the exporter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.export.tiny_gguf import MERGES, SPECIAL_TOKENS, TEMPLATE, TOKENS
from tests.tools.byte_level import SpecialToken, write_byte_level

Doubles: TypeAlias = NDArray[np.float64]
Dtype = Literal["bf16", "f16", "f32"]
Rope = Literal["default", "linear", "llama3", "yarn"]
Spelling = Literal["new", "old"]

CONTEXT = 128

SIZES: Mapping[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,  # an odd number of blocks of 32
    "num_hidden_layers": 3,
    "num_attention_heads": 6,  # no power of two
    "num_key_value_heads": 2,
    "vocab_size": len(TOKENS) + 5,  # odd, and more than the tokenizer knows
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""What a tiny model is unless a test says otherwise, by transformers' names."""

ROPES: Mapping[Rope, Mapping[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": CONTEXT // 4,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT // 4},
}
"""Every kind of rotary scaling that the llama family's files name, sized so that a tiny context feels it."""


def write_llama(folder: Path, **changes: Any) -> Path:
    """Write a llama checkpoint; returns its folder. `changes`: see `_write`."""
    return _write(folder, LlamaConfig, LlamaForCausalLM, **({"tie_word_embeddings": False} | changes))


def write_qwen2(folder: Path, **changes: Any) -> Path:
    """Write a qwen2 checkpoint (biases on q, k and v), tied; returns its folder. `changes`: see `_write`."""
    return _write(folder, Qwen2Config, Qwen2ForCausalLM, **({"tie_word_embeddings": True} | changes))


def _write(
    folder: Path,
    make_config: Callable[..., Any],
    make_model: Callable[..., Any],
    *,
    rope: Rope = "default",
    rope_theta: float = 10_000.0,
    dtype: Dtype = "bf16",
    spelling: Spelling = "new",
    max_shard_size: str = "1GB",
    seed: int = 7,
    **sizes: Any,
) -> Path:
    """Write a checkpoint; `sizes` go into the configuration as they are, by transformers' names.

    spelling "old" names rope and dtype in config.json as transformers 4 did and most files on the hub do.
    A small `max_shard_size` ("100KB") makes several files and an index.
    """
    parameters = {"rope_theta": rope_theta, **ROPES[rope]}
    model = make_model(make_config(**{**SIZES, "rope_parameters": parameters, **sizes}))
    _fill(model, seed)
    model.to(_TORCH_DTYPES[dtype]).save_pretrained(folder, max_shard_size=max_shard_size)
    if spelling == "old":
        _spell_as_before(folder / "config.json")
    _write_tokenizer(folder)
    return folder


_TORCH_DTYPES: Mapping[Dtype, Any] = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def _fill(model: Any, seed: int) -> None:
    """Random values in every tensor: fresh norms are all ones and fresh biases zeros, which would hide mistakes."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=random)
            if name.endswith("norm.weight"):
                values = 1 + 0.1 * values
            elif name.endswith("bias"):
                values = 0.1 * values
            else:
                values = values / sqrt(parameter.shape[-1])
            parameter.copy_(values)


def _spell_as_before(path: Path) -> None:
    config = json.loads(path.read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2) + "\n")


def _write_tokenizer(folder: Path) -> None:
    write_byte_level(folder, TOKENS, MERGES, [SpecialToken(index, text) for index, text in enumerate(SPECIAL_TOKENS)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_reference(folder: Path) -> Any:
    """The folder's model in transformers, fp32 on the CPU, every operator spelt out; MXFP4 becomes its exact values."""
    config = AutoConfig.from_pretrained(folder)
    quantised = hasattr(config, "quantization_config")
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        **({"experts_implementation": "eager"} if hasattr(config, "num_local_experts") else {}),
        **({"quantization_config": Mxfp4Config(dequantize=True)} if quantised else {}),
    ).eval()


def reference_logits(folder: Path, ids: Sequence[int]) -> Doubles:
    """Logits [len(ids), vocab] of all positions, computed at once."""
    return reference_step_by_step(folder, ids, steps=[len(ids)])


def reference_step_by_step(folder: Path, ids: Sequence[int], steps: Sequence[int] | None = None) -> Doubles:
    """Logits [len(ids), vocab], computed with a KV cache: `steps` ids at a time, by default one by one."""
    model = load_reference(folder)
    cache = DynamicCache(config=model.config)
    logits = []
    done = 0
    with torch.inference_mode():
        for count in steps or [1] * len(ids):
            step = torch.tensor([ids[done : done + count]])
            logits.append(model(step, past_key_values=cache, use_cache=True).logits[0])
            done += count
    assert done == len(ids), f"the steps cover {done} of {len(ids)} ids"
    result: Doubles = torch.cat(logits).double().numpy()
    return result
