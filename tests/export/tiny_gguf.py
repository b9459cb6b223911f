"""Models of the llama family small enough to export in a blink: random weights, every odd case in them, a whole
tokenizer. Written by PyPI's `gguf`, which the exporter does not use."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from export.forms.values import Bytes, Doubles
from export.spec import DecoderSpec, Divided, Family, Kind, Rope
from tests.export import ggml_bytes
from tests.export.byte_alphabet import BYTE_LETTERS

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "Ġ hell", "Ġ Ġ"]
TOKENS = SPECIAL_TOKENS + BYTE_LETTERS + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"

_QKV = ("attn_q", "attn_k", "attn_v")


@dataclass
class TinyLlama:
    """What the file will hold; a test bends what it wants before `write`.

    kinds: by a tensor's name ("blk.0.attn_v.weight") or its part ("attn_v"), else Q8_0 for vocabulary tables and Q4_1
    for other matrices; vectors are F32 unless named in full. Filled in: `shapes`, `raw` (bytes of each tensor) and
    `metadata` (every key). All by GGUF's names and in its order of rows.
    """

    layers: int = 2
    hidden: int = 64
    intermediate: int = 96  # an odd number of blocks
    heads: int = 4
    kv_heads: int = 2
    context_tokens: int = 64
    tied_head: bool = True
    architecture: Family = Family.LLAMA
    qkv_bias: bool = False
    rope_divisors: tuple[float, ...] | None = None
    kinds: dict[str, Kind] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    raw: dict[str, Bytes] = field(init=False)
    metadata: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(7)
        self.shapes = self._shapes()
        self.raw = {name: self._random(random, name, shape) for name, shape in self.shapes.items()}
        self.metadata = self._metadata()
        if self.rope_divisors is not None:
            self.raw["rope_freqs.weight"] = ggml_bytes.float_bytes(np.array(self.rope_divisors), Kind.F32)
            self.shapes["rope_freqs.weight"] = (len(self.rope_divisors),)

    @property
    def spec(self) -> DecoderSpec:
        """The sizes as the exporter must find them."""
        return DecoderSpec(
            family=self.architecture,
            layers=self.layers,
            hidden=self.hidden,
            intermediate=self.intermediate,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            vocab=len(TOKENS),
            context_tokens=self.context_tokens,
            rope=Rope(10_000.0, Divided(self.rope_divisors) if self.rope_divisors else None),
            norm_epsilon=float(np.float32(1e-5)),
            tied_head=self.tied_head,
            windows=(0,) * self.layers,
            qkv_bias=self.qkv_bias,
        )

    def kind(self, name: str) -> Kind:
        """How a tensor is stored."""
        part = name.split(".")[-2]
        if name in self.kinds:
            return self.kinds[name]
        if len(self.shapes[name]) == 1:
            return Kind.F32
        return self.kinds.get(part, Kind.Q8_0 if part in ("token_embd", "output") else Kind.Q4_1)

    def weights(self, name: str) -> Doubles:
        """A tensor's numbers as PyPI's gguf reads them."""
        return ggml_bytes.weights(self.raw[name], self.kind(name), self.shapes[name])

    def write(self, path: Path) -> Path:
        """Write the file; returns its path."""
        writer = gguf.GGUFWriter(path, self.metadata["general.architecture"])
        for key, value in self.metadata.items():
            if key == "general.architecture":
                continue
            if isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, int) and not isinstance(value, bool):
                writer.add_key_value(key, value, gguf.GGUFValueType.UINT32)
            elif value is not None:
                writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        for name, raw in self.raw.items():
            writer.add_tensor(name, raw, raw_dtype=ggml_bytes.library_type(self.kind(name)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _random(self, random: np.random.Generator, name: str, shape: tuple[int, ...]) -> Bytes:
        if name.endswith("norm.weight") and self.kind(name).is_float:
            return ggml_bytes.float_bytes(random.uniform(0.5, 1.5, shape), self.kind(name))
        return ggml_bytes.random_rows(random, self.kind(name), shape)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        head_dim = self.hidden // self.heads
        rows = {"attn_q": self.heads * head_dim, "attn_k": self.kv_heads * head_dim, "attn_v": self.kv_heads * head_dim}
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), self.hidden)}
        shapes["output_norm.weight"] = (self.hidden,)
        if not self.tied_head:
            shapes["output.weight"] = (len(TOKENS), self.hidden)
        for layer in range(self.layers):
            prefix = f"blk.{layer}."
            shapes |= {f"{prefix}{part}.weight": (rows[part], self.hidden) for part in _QKV}
            shapes |= {f"{prefix}{part}.bias": (rows[part],) for part in _QKV if self.qkv_bias}
            shapes |= {
                prefix + "attn_norm.weight": (self.hidden,),
                prefix + "attn_output.weight": (self.hidden, rows["attn_q"]),
                prefix + "ffn_norm.weight": (self.hidden,),
                prefix + "ffn_gate.weight": (self.intermediate, self.hidden),
                prefix + "ffn_up.weight": (self.intermediate, self.hidden),
                prefix + "ffn_down.weight": (self.hidden, self.intermediate),
            }
        return shapes

    def _metadata(self) -> dict[str, Any]:
        sizes = {
            "block_count": self.layers,
            "context_length": self.context_tokens,
            "embedding_length": self.hidden,
            "feed_forward_length": self.intermediate,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }
        tokenizer = {
            "model": "gpt2",
            "pre": "smollm",
            "tokens": TOKENS,
            "token_type": [3] * len(SPECIAL_TOKENS) + [1] * (len(TOKENS) - len(SPECIAL_TOKENS)),
            "merges": MERGES,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return {
            "general.architecture": self.architecture.value,
            **{f"{self.architecture}.{key}": value for key, value in sizes.items()},
            **{f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()},
            "tokenizer.chat_template": TEMPLATE,
        }


def tiny_qwen2(**changes: Any) -> TinyLlama:
    """A qwen2: rows of q and k as Hugging Face has them, biases on q, k and v."""
    settings: dict[str, Any] = {"architecture": Family.QWEN2, "qkv_bias": True}
    return TinyLlama(**settings | changes)


def tiny_q4_k_m(**changes: Any) -> TinyLlama:
    """What llama.cpp calls Q4_K_M: half of attn_v and ffn_down in Q6_K, and a head of its own in Q6_K."""
    kinds = dict.fromkeys(("token_embd", *_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"), Kind.Q4_K)
    kinds |= {"output": Kind.Q6_K, "blk.0.attn_v.weight": Kind.Q6_K, "blk.0.ffn_down.weight": Kind.Q6_K}
    settings: dict[str, Any] = {"hidden": 256, "intermediate": 512, "tied_head": False, "kinds": kinds}
    return TinyLlama(**settings | changes)
