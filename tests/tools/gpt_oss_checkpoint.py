"""Synthetic GPT-OSS checkpoints in exactly the on-disk format of openai/gpt-oss-20b, of any size, in little memory.

Files, keys, names, types and layouts are the real model's; the numbers are random, of magnitudes that keep a model
of any depth finite. Drawn and written in pieces: the full shape takes 13.8 GB of disk, 80 MB of memory and about a
minute. Knows neither torch nor what reads the files.

    python -m tests.tools.gpt_oss_checkpoint OUT --layers 2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log2, prod, sqrt
from pathlib import Path
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from tests.tools import gpt_oss_tokenizer
from tests.tools.safetensors_files import Array, StoredTensor, write_safetensors

TokenizerKind = Literal["tiny", "gpt-oss", "none"]

GENUINE_TOKENIZER = Path(".cache/tokenizers/gpt-oss/tokenizer.json")
"""Where scripts/get-tokenizer puts it."""

PIECE = 1 << 22
"""Elements drawn at a time."""

BLOCK = 32
"""Elements that share a scale."""

FP4_RMS = sqrt(68.5 / 8)
"""Root mean square of the 16 values that 4 bits stand for."""

SCALE_SPREAD_RMS = sqrt((0.5**2 + 1 + 2**2) / 3)
"""Root mean square of the factors that exponents e-1, e and e+1 give."""

PADDING_IDS = 11
"""Ids above the special tokens of a small vocabulary, which no tokenizer knows; the real model has 1,069."""


@dataclass(frozen=True)
class GptOssShape:
    """The sizes of a checkpoint. Layers alternate: sliding window first, then full attention."""

    layers: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window: int
    shard_bytes: int
    seed: int = 0

    @property
    def first_special(self) -> int:
        """Id of `<|startoftext|>`: the genuine one where the vocabulary is large enough, else near the top."""
        genuine = gpt_oss_tokenizer.FIRST_SPECIAL_ID
        count = len(gpt_oss_tokenizer.SPECIAL_TEXTS)
        return genuine if self.vocab >= genuine + count else self.vocab - PADDING_IDS - count

    def id_of(self, special: str) -> int:
        """Id of a special token by its text."""
        return self.first_special + gpt_oss_tokenizer.SPECIAL_TEXTS.index(special)


FULL = GptOssShape(
    layers=24,
    hidden=2880,
    intermediate=2880,
    experts=32,
    top_k=4,
    heads=64,
    kv_heads=8,
    head_dim=64,
    vocab=201_088,
    window=128,
    shard_bytes=4_800_000_000,
)
"""openai/gpt-oss-20b."""

TINY = GptOssShape(
    layers=4,
    hidden=96,  # blocks of 32, not of 64
    intermediate=160,  # an odd number of blocks, and not the hidden size
    experts=6,
    top_k=3,
    heads=6,
    kv_heads=2,
    head_dim=32,  # heads * head_dim is not the hidden size
    vocab=331,
    window=16,
    shard_bytes=300_000,
)
"""Every odd corner in a megabyte: small enough for a test to make it anew."""


CHANGEABLE = ("layers", "experts", "vocab", "window", "shard_bytes", "seed")
"""What the command line changes."""


@dataclass(frozen=True)
class Normal:
    """bf16 values around `mean`."""

    mean: float
    std: float


@dataclass(frozen=True)
class Codes:
    """Bytes of two fp4 codes each, all equally likely."""


@dataclass(frozen=True)
class Exponents:
    """Scale bytes `middle` - 1, `middle` and `middle` + 1."""

    middle: int


@dataclass(frozen=True)
class Planned:
    """A tensor before its values are drawn."""

    name: str
    shape: tuple[int, ...]
    values: Normal | Codes | Exponents

    @property
    def nbytes(self) -> int:
        """The size in the file."""
        return prod(self.shape) * (2 if isinstance(self.values, Normal) else 1)


def planned_tensors(shape: GptOssShape) -> list[Planned]:
    """Every tensor of the checkpoint, layer by layer, the vocabulary's tables last."""
    tensors = [tensor for layer in range(shape.layers) for tensor in _layer(shape, f"model.layers.{layer}.")]
    table = (shape.vocab, shape.hidden)
    tensors.append(Planned("model.norm.weight", (shape.hidden,), Normal(1, 0.1)))
    tensors.append(Planned("model.embed_tokens.weight", table, Normal(0, 1)))
    tensors.append(Planned("lm_head.weight", table, Normal(0, 1 / sqrt(shape.hidden))))
    return tensors


def _layer(shape: GptOssShape, prefix: str) -> Iterator[Planned]:
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield Planned(f"{prefix}{norm}.weight", (hidden,), Normal(1, 0.1))
    yield from _linear(f"{prefix}self_attn.q_proj", queries, hidden)
    yield from _linear(f"{prefix}self_attn.k_proj", keys, hidden)
    yield from _linear(f"{prefix}self_attn.v_proj", keys, hidden)
    yield from _linear(f"{prefix}self_attn.o_proj", hidden, queries)
    yield Planned(f"{prefix}self_attn.sinks", (shape.heads,), Normal(0, 1))
    yield from _linear(f"{prefix}mlp.router", shape.experts, hidden)
    yield from _experts(f"{prefix}mlp.experts.gate_up_proj", shape.experts, 2 * shape.intermediate, hidden)
    yield from _experts(f"{prefix}mlp.experts.down_proj", shape.experts, hidden, shape.intermediate)


def _linear(name: str, rows: int, columns: int) -> Iterator[Planned]:
    yield Planned(f"{name}.weight", (rows, columns), Normal(0, 1 / sqrt(columns)))
    yield Planned(f"{name}.bias", (rows,), Normal(0, 0.1))


def _experts(name: str, experts: int, rows: int, columns: int) -> Iterator[Planned]:
    blocks = (experts, rows, columns // BLOCK)
    middle = 127 + round(-log2(sqrt(columns) * FP4_RMS * SCALE_SPREAD_RMS))
    yield Planned(f"{name}_blocks", (*blocks, BLOCK // 2), Codes())
    yield Planned(f"{name}_scales", blocks, Exponents(middle))
    yield Planned(f"{name}_bias", (experts, rows), Normal(0, 0.1))


def shards(tensors: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    """Cut in order, as the real checkpoint is: a file ends before the tensor that would make it too large."""
    result: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if result[-1] and size + tensor.nbytes > shard_bytes:
            result.append([])
            size = 0
        result[-1].append(tensor)
        size += tensor.nbytes
    return result


def stored_tensor(planned: Planned, seed: int) -> StoredTensor:
    """The tensor with its values, which depend on the seed and its name alone."""
    dtype = "BF16" if isinstance(planned.values, Normal) else "U8"

    def pieces() -> Iterator[Array]:
        random = np.random.Generator(np.random.SFC64([seed, *planned.name.encode()]))
        left = prod(planned.shape)
        while left:
            count = min(left, PIECE)
            yield _draw(random, planned.values, count)
            left -= count

    return StoredTensor(planned.name, dtype, planned.shape, pieces)


def _draw(random: np.random.Generator, values: Normal | Codes | Exponents, count: int) -> Array:
    match values:
        case Normal(mean, std):
            drawn = random.standard_normal(count, np.float32)
            drawn *= np.float32(std)
            drawn += np.float32(mean)
            return drawn.astype(ml_dtypes.bfloat16)
        case Codes():
            # Whole words straight from the bit generator: five times as fast as bytes.
            words = random.bit_generator.random_raw(-(-count // 8))
            return np.asarray(words, np.uint64).view(np.uint8)[:count]
        case Exponents(middle):
            return random.integers(middle - 1, middle + 2, count, np.uint8)


def model_config(shape: GptOssShape) -> dict[str, Any]:
    """config.json with the real model's keys."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": shape.id_of("<|return|>"),
        "experts_per_token": shape.top_k,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(shape.layers)],
        "max_position_embeddings": 131_072,
        "model_type": "gpt_oss",
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "num_local_experts": shape.experts,
        "output_router_logits": False,
        "pad_token_id": shape.id_of("<|endoftext|>"),
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150_000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": shape.window,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def generation_config(shape: GptOssShape) -> dict[str, Any]:
    """generation_config.json with the real model's keys."""
    return {
        "bos_token_id": shape.id_of("<|startoftext|>"),
        "do_sample": True,
        "eos_token_id": [shape.id_of(text) for text in ("<|return|>", "<|endoftext|>", "<|call|>")],
        "pad_token_id": shape.id_of("<|endoftext|>"),
        "transformers_version": "4.55.0.dev0",
    }


def write_checkpoint(
    folder: Path, shape: GptOssShape, *, tokenizer: TokenizerKind = "tiny", genuine_tokenizer: Path = GENUINE_TOKENIZER
) -> Path:
    """Write a whole checkpoint into `folder`; returns it. `genuine_tokenizer`: the file for "gpt-oss"."""
    folder.mkdir(parents=True, exist_ok=True)
    match tokenizer:  # first: if it cannot be written, no gigabytes have been
        case "tiny":
            gpt_oss_tokenizer.write_tiny(folder, shape.first_special)
        case "gpt-oss":
            gpt_oss_tokenizer.write_genuine(folder, genuine_tokenizer, shape.first_special)
        case "none":
            pass
    _write_json(folder / "config.json", model_config(shape))
    _write_json(folder / "generation_config.json", generation_config(shape))
    _write_shards(folder, shape)
    return folder


def _write_shards(folder: Path, shape: GptOssShape) -> None:
    parts = shards(planned_tensors(shape), shape.shard_bytes)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts):
        # The real files count from 0 and name the last number, not the count.
        file = f"model-{number:05d}-of-{len(parts) - 1:05d}.safetensors"
        write_safetensors(folder / file, [stored_tensor(planned, shape.seed) for planned in part])
        weight_map |= {planned.name: file for planned in part}
    total = sum(planned.nbytes for part in parts for planned in part)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--tiny", action="store_true", help="start from the tiny shape instead of the full one")
    for name in CHANGEABLE:
        parser.add_argument("--" + name.replace("_", "-"), type=int, help="instead of the shape's own")
    parser.add_argument(
        "--tokenizer", choices=get_args(TokenizerKind), default="tiny", help="gpt-oss: run scripts/get-tokenizer before"
    )
    options = parser.parse_args(argv)
    changes = {name: getattr(options, name) for name in CHANGEABLE if getattr(options, name) is not None}
    shape = replace(TINY if options.tiny else FULL, **changes)
    write_checkpoint(options.out, shape, tokenizer=options.tokenizer)
    print(f"{options.out}: {sum(tensor.nbytes for tensor in planned_tensors(shape)) / 1e9:.2f} GB of tensors")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
