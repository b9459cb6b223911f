"""Graphs of the llama family compute what transformers computes (float weights) and what a GGUF's formulas say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export.errors import SourceError
from export.graphs.families import build_graph
from export.recipes import Dense, Plan, Recipe
from export.sources.gguf import GgufCheckpoint
from export.sources.safetensors import SafetensorsCheckpoint
from export.spec import DecoderSpec, Kind
from tests.export.graph_runner import (
    Runner,
    decoded_weights,
    export_in_memory,
    log_softmax,
    without_int8_activations,
)
from tests.export.llama_reference import logits as formulas
from tests.export.tiny_gguf import TinyLlama, tiny_q4_k_m, tiny_qwen2
from tests.tools import hf_checkpoints as tools

TOKENS = 61
CAPACITY = 64
ODD_CHUNKS = (1, 7, 2, 19, 3, 29)
WINDOW = 9

FOLDERS: Mapping[str, Callable[[Path], Path]] = {
    "llama": lambda folder: tools.write_llama(folder),
    "llama, tied": lambda folder: tools.write_llama(folder, tie_word_embeddings=True, rope="linear"),
    "llama 3.1": lambda folder: tools.write_llama(folder, rope="llama3"),
    "llama, yarn": lambda folder: tools.write_llama(folder, rope="yarn", dtype="f16"),
    "llama, odd": lambda folder: tools.write_llama(
        folder,
        hidden_size=63,
        intermediate_size=83,
        num_hidden_layers=1,
        num_attention_heads=7,
        num_key_value_heads=1,
        head_dim=48,
        dtype="f32",
    ),
    "qwen2": lambda folder: tools.write_qwen2(folder),
    "qwen2, untied, windows": lambda folder: tools.write_qwen2(
        folder, tie_word_embeddings=False, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
}
"""Every option that changes the graph, alone or with others that do not touch the same part."""


def prompt(vocab: int, seed: int = 3) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab, TOKENS)]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders by name, each written once."""
    written: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in written:
            written[name] = FOLDERS[name](tmp_path_factory.mktemp("model"))
        return written[name]

    return folder_of


def open_runner(folder: Path, slots: int = 1) -> Runner:
    checkpoint = SafetensorsCheckpoint.open(folder)
    return Runner(export_in_memory(checkpoint, Recipe.FP32), checkpoint.spec, CAPACITY, slots)


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_are_those_of_transformers_at_once_in_odd_chunks_and_step_by_step(
    folder_of: Callable[[str], Path], name: str
) -> None:
    runner = open_runner(folder_of(name))
    ids = prompt(runner.spec.vocab)
    expected = tools.reference_logits(folder_of(name), ids)
    assert np.abs(expected).max() > 1
    for chunks in ((), ODD_CHUNKS, (1,) * TOKENS):
        runner.clear()
        np.testing.assert_allclose(runner.read(ids, chunks), expected, atol=1e-5, rtol=0)


def test_a_window_is_felt(folder_of: Callable[[str], Path]) -> None:
    """Else the comparison above would say nothing about windows."""
    runner = open_runner(folder_of("qwen2, untied, windows"))
    assert runner.spec.windows == (0, WINDOW, WINDOW)
    ids = prompt(runner.spec.vocab)
    model = export_in_memory(SafetensorsCheckpoint.open(folder_of("qwen2, untied, windows")), Recipe.FP32)
    for node in model.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "local_window_size"]
        del node.attribute[:]
        node.attribute.extend(kept)
    unlimited = Runner(model, runner.spec, CAPACITY)
    difference = np.abs(runner.read(ids) - unlimited.read(ids)).max(-1)
    assert difference[:WINDOW].max() < 1e-5
    assert difference[WINDOW] > 1e-3


def test_a_ragged_batch_decodes_what_each_sequence_decodes_alone(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("qwen2, untied, windows")
    runner = open_runner(folder, slots=3)
    prompts = [prompt(runner.spec.vocab, seed)[:length] for seed, length in enumerate((5, 41, 17))]
    for slot, ids in enumerate(prompts):
        runner.read(ids[:-2], slot=slot)
    for last in (-2, -1):
        tokens = np.array([[ids[last]] for ids in prompts])
        logits = runner.step(0, tokens, [len(ids) + last + 1 for ids in prompts])
    for found, ids in zip(logits, prompts, strict=True):
        np.testing.assert_allclose(found, tools.reference_logits(folder, ids)[-1], atol=1e-5, rtol=0)


def test_logits_are_made_for_the_wanted_positions_only(folder_of: Callable[[str], Path]) -> None:
    runner = open_runner(folder_of("llama"))
    ids = np.array([prompt(runner.spec.vocab)])
    every = runner.step(0, ids, [TOKENS])
    assert runner.step(0, ids, [TOKENS], wanted=[]).shape == (0, runner.spec.vocab)
    np.testing.assert_allclose(runner.step(0, ids, [TOKENS], wanted=[60, 3]), every[[60, 3]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("spec", [replace(TinyLlama().spec, head_dim=24), replace(TinyLlama().spec, heads=5)])
def test_heads_that_no_attention_operator_takes_are_refused_before_any_work(spec: DecoderSpec) -> None:
    with pytest.raises(SourceError, match=r"attention needs heads of a multiple of 16"):
        build_graph(spec, {}, Plan(Recipe.FP32))


GGUFS: Mapping[str, Callable[[], TinyLlama]] = {
    "Q4_1, Q8_0 tables": lambda: TinyLlama(),
    "untied": lambda: TinyLlama(tied_head=False),
    "Q4_1 table, tied": lambda: TinyLlama(kinds={"token_embd": Kind.Q4_1}),
    "Q4_0 table, Q6_K head": lambda: TinyLlama(
        hidden=256, tied_head=False, kinds={"token_embd": Kind.Q4_0, "output": Kind.Q6_K}
    ),
    "F16": lambda: TinyLlama(kinds=dict.fromkeys(("token_embd", "attn_q", "ffn_down"), Kind.F16)),
    "Q4_K_M": tiny_q4_k_m,
    "divided frequencies": lambda: TinyLlama(rope_divisors=(1.0, 1.0, 1.5, 3.0, 8.0, 8.0, 8.0, 8.0)),
    "qwen2": tiny_qwen2,
    "qwen2, kinds of every sort": lambda: tiny_qwen2(
        kinds={"attn_q": Kind.Q8_0, "attn_k": Kind.Q4_1, "attn_v": Kind.Q4_0, "ffn_up": Kind.Q8_0}
    ),
}


@pytest.mark.parametrize("name", GGUFS)
@pytest.mark.parametrize("recipe", [Recipe.GGUF_EXACT, Recipe.GGUF_PARITY])
def test_a_gguf_computes_what_its_formulas_say(tmp_path: Path, name: str, recipe: Recipe) -> None:
    model = GGUFS[name]()
    checkpoint = GgufCheckpoint.open(model.write(tmp_path / "model.gguf"))
    exported = without_int8_activations(export_in_memory(checkpoint, recipe))
    ids = prompt(model.spec.vocab)
    found = Runner(exported, checkpoint.spec, CAPACITY).read(ids)
    expected = formulas(model, ids)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", ["Q4_1 table, tied", "Q4_K_M"])
def test_what_is_served_stays_near_the_formulas_with_int8_activations(tmp_path: Path, name: str) -> None:
    model = GGUFS[name]()
    checkpoint = GgufCheckpoint.open(model.write(tmp_path / "model.gguf"))
    ids = prompt(model.spec.vocab)
    found = Runner(export_in_memory(checkpoint, Recipe.GGUF_EXACT), checkpoint.spec, CAPACITY).read(ids)
    expected, ours = log_softmax(formulas(model, ids)), log_softmax(found.astype(np.float64))
    # Floats come within 1e-11: what is served trades that for speed.
    assert 1e-9 < (np.exp(expected) * (expected - ours)).sum(-1).mean() < 0.05


@pytest.mark.parametrize("name", GGUFS)
def test_a_gguf_for_cuda_computes_in_float16(tmp_path: Path, name: str) -> None:
    """Run on the CPU: the same types, shapes and numbers, other kernels."""
    model = GGUFS[name]()
    checkpoint = GgufCheckpoint.open(model.write(tmp_path / "model.gguf"))
    runner = Runner(export_in_memory(checkpoint, Recipe.CUDA_INT8, Dense.EXACT), checkpoint.spec, CAPACITY)
    ids = prompt(model.spec.vocab)
    found = runner.read(ids, ODD_CHUNKS)
    assert found.dtype == runner.pool.dtype == np.float16
    expected = formulas(model, ids)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("dense", Dense)
@pytest.mark.parametrize("recipe", [Recipe.CPU_INT8, Recipe.CPU_INT4])
def test_quantised_floats_compute_what_their_codes_stand_for(
    folder_of: Callable[[str], Path], recipe: Recipe, dense: Dense
) -> None:
    folder = folder_of("qwen2, untied, windows")
    checkpoint = SafetensorsCheckpoint.open(folder)
    exported = without_int8_activations(export_in_memory(checkpoint, recipe, dense))
    ids = prompt(checkpoint.spec.vocab)
    found = Runner(exported, checkpoint.spec, CAPACITY).read(ids)
    model = tools.load_reference(folder)
    parameters = dict(model.named_parameters())
    with torch.inference_mode():
        unchanged = model(torch.tensor([ids])).logits[0].double().numpy()
        for name, weights in decoded_weights(checkpoint, recipe, dense).items():
            parameters[name].copy_(torch.from_numpy(weights))
        expected = model(torch.tensor([ids])).logits[0].double().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)
    # Far from the model before it was quantised: the codes have been used.
    assert np.abs(expected - unchanged).max() > 1e-3
