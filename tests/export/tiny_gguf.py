"""A llama small enough to export in a blink: random weights, every odd case in them, a whole tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from export.llama_spec import LlamaSpec, expected_shapes
from export.quantize import BLOCK, BlockFormat, Blocks, Bytes, encode
from tests.export.byte_alphabet import BYTE_LETTERS

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "Ġ hell", "Ġ Ġ"]
TOKENS = SPECIAL_TOKENS + BYTE_LETTERS + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


@dataclass
class TinyLlama:
    """What the file will hold; a test bends what it wants before `write`."""

    layers: int = 2
    hidden: int = 64
    intermediate: int = 96  # an odd number of blocks
    heads: int = 4
    kv_heads: int = 2
    context_tokens: int = 64
    tied_head: bool = True
    architecture: str = "llama"
    metadata: dict[str, Any] = field(default_factory=dict)
    formats: dict[str, BlockFormat] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Blocks] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random = np.random.default_rng(7)
        for name, shape in expected_shapes(self.spec).items():
            if len(shape) == 1:
                self.tensors[name] = random.uniform(0.5, 1.5, shape).astype(np.float32)
                continue
            symmetric = name in ("token_embd.weight", "output.weight")
            self.formats[name] = BlockFormat.Q8_0 if symmetric else BlockFormat.Q4_1
            self.blocks[name] = random_blocks(random, self.formats[name], (shape[0], shape[1]))

    @property
    def spec(self) -> LlamaSpec:
        """The sizes as the exporter must find them."""
        return LlamaSpec(
            layers=self.layers,
            hidden=self.hidden,
            intermediate=self.intermediate,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            vocab=len(TOKENS),
            context_tokens=self.context_tokens,
            rope_base=10_000.0,
            norm_epsilon=1e-5,
            tied_head=self.tied_head,
            formats=self.formats,
        )

    def write(self, path: Path) -> Path:
        """Write the file; returns its path."""
        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_block_count(self.layers)
        writer.add_context_length(self.context_tokens)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.intermediate)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.metadata.get("pre", "smollm"))
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * len(SPECIAL_TOKENS) + [1] * (len(TOKENS) - len(SPECIAL_TOKENS)))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        if self.metadata.get("template", True):
            writer.add_chat_template(TEMPLATE)
        if scaling := self.metadata.get("rope_scaling"):
            writer.add_rope_scaling_type(scaling)
        for name, values in self.tensors.items():
            writer.add_tensor(name, values)
        for name, blocks in self.blocks.items():
            kind = gguf.GGMLQuantizationType[self.formats[name].value]
            writer.add_tensor(name, encode(blocks, self.formats[name]), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def random_blocks(random: np.random.Generator, block_format: BlockFormat, shape: tuple[int, int]) -> Blocks:
    """Random weights of size 0.2; some blocks have scale 0 (constant), some are all zero."""
    size = (shape[0], shape[1] // BLOCK)
    codes: Bytes = random.integers(0, 1 << block_format.bits, (*size, BLOCK), dtype=np.uint8)
    levels = 1 << (block_format.bits - 1)
    scales = (random.uniform(0.5, 1.5, size) * 0.2 / levels).astype(np.float16).astype(np.float32)
    minimums = random.uniform(-0.3, -0.1, size).astype(np.float16).astype(np.float32)
    scales[random.random(size) < 0.1] = 0
    minimums[(scales == 0) & (random.random(size) < 0.5)] = 0
    return Blocks(
        block_format.bits, codes, scales, scales * np.float32(-128) if block_format.is_symmetric else minimums
    )
