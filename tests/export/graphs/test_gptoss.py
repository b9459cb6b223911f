"""gpt-oss graphs compute what transformers computes, and each form of experts what its codes stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.forms.values import Doubles
from export.graphs.families import build_graph
from export.recipes import Dense, Plan, Recipe
from export.sources.safetensors import SafetensorsCheckpoint
from tests.export.graph_runner import Runner, decoded_weights, export_in_memory, without_int8_activations
from tests.export.moe_mxfp4 import with_operator
from tests.tools import hf_checkpoints as tools
from tests.tools.gpt_oss_checkpoint import TINY, write_checkpoint

TOKENS = 61
CAPACITY = 64
ODD_CHUNKS = (1, 7, 2, 19, 3, 29)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("gpt-oss"), TINY)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> SafetensorsCheckpoint:
    return SafetensorsCheckpoint.open(folder)


def prompt(seed: int = 3) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, TINY.vocab, TOKENS)]


def test_logits_are_those_of_transformers_at_once_in_odd_chunks_and_step_by_step(
    folder: Path, checkpoint: SafetensorsCheckpoint
) -> None:
    assert TINY.window < TOKENS / 2, "the prompt must cross the window's edge"
    runner = Runner(export_in_memory(checkpoint, Recipe.FP32), checkpoint.spec, CAPACITY)
    expected = tools.reference_logits(folder, prompt())
    assert np.abs(expected).max() > 1
    for chunks in ((), ODD_CHUNKS, (1,) * TOKENS):
        runner.clear()
        np.testing.assert_allclose(runner.read(prompt(), chunks), expected, atol=1e-5, rtol=0)


def test_a_ragged_batch_decodes_what_each_sequence_decodes_alone(
    folder: Path, checkpoint: SafetensorsCheckpoint
) -> None:
    runner = Runner(export_in_memory(checkpoint, Recipe.FP32), checkpoint.spec, CAPACITY, slots=3)
    prompts = [prompt(seed)[:length] for seed, length in enumerate((5, 41, 17))]
    for slot, ids in enumerate(prompts):
        runner.read(ids[:-2], slot=slot)
    for last in (-2, -1):
        tokens = np.array([[ids[last]] for ids in prompts])
        logits = runner.step(0, tokens, [len(ids) + last + 1 for ids in prompts])
    for found, ids in zip(logits, prompts, strict=True):
        np.testing.assert_allclose(found, tools.reference_logits(folder, ids)[-1], atol=1e-5, rtol=0)


def dequantised_logits(folder: Path, checkpoint: SafetensorsCheckpoint, plan: Plan, ids: list[int]) -> Doubles:
    """transformers' logits with the numbers that a plan's forms stand for."""
    model = tools.load_reference(folder)
    parameters = dict(model.named_parameters())
    with torch.inference_mode():
        for name, weights in decoded_weights(checkpoint, plan.recipe, plan.dense).items():
            values = torch.from_numpy(weights).reshape(checkpoint.tensors[name].shape)
            # transformers has the experts' columns before their rows.
            parameters[name].copy_(values.transpose(1, 2) if values.ndim == 3 else values)
        logits: Doubles = model(torch.tensor([ids])).logits[0].double().numpy()
    return logits


@pytest.mark.parametrize("dense", Dense)
@pytest.mark.parametrize("recipe", [Recipe.CPU_INT8, Recipe.CPU_INT4])
def test_quantised_experts_compute_what_their_codes_stand_for(
    folder: Path, checkpoint: SafetensorsCheckpoint, recipe: Recipe, dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_floats(monkeypatch)
    exported = without_int8_activations(export_in_memory(checkpoint, recipe, dense))
    found = Runner(exported, checkpoint.spec, CAPACITY).read(prompt())
    expected = dequantised_logits(folder, checkpoint, Plan(recipe, dense), prompt())
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime computes 8-bit experts with int8 activations, unless told so when the session is made."""
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "fp32")


def test_eight_bits_hold_the_experts_exactly(
    folder: Path, checkpoint: SafetensorsCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_floats(monkeypatch)
    runner = Runner(export_in_memory(checkpoint, Recipe.CPU_INT8, Dense.EXACT), checkpoint.spec, CAPACITY)
    np.testing.assert_allclose(runner.read(prompt()), tools.reference_logits(folder, prompt()), atol=1e-5, rtol=0)


def test_experts_as_published_are_for_an_operator_of_our_own(folder: Path, checkpoint: SafetensorsCheckpoint) -> None:
    exported = export_in_memory(checkpoint, Recipe.CPU_MXFP4, Dense.EXACT)
    runner = Runner(with_operator(exported), checkpoint.spec, CAPACITY)
    np.testing.assert_allclose(runner.read(prompt()), tools.reference_logits(folder, prompt()), atol=1e-5, rtol=0)
    assert ("edgechat", 1) in {(opset.domain, opset.version) for opset in exported.opset_import}


@pytest.mark.parametrize("recipe", [recipe for recipe in Recipe if not recipe.startswith("gguf")])
def test_a_graph_says_which_operators_onnx_runtime_has_not(checkpoint: SafetensorsCheckpoint, recipe: Recipe) -> None:
    graph = build_graph(checkpoint.spec, checkpoint.tensors, Plan(recipe))
    assert graph.operators() == (["edgechat.MoeMxfp4"] if recipe is Recipe.CPU_MXFP4 else [])


@pytest.mark.parametrize("recipe", [Recipe.CUDA_INT8, Recipe.CUDA_INT4])
def test_graphs_for_cuda_compute_in_float16(
    folder: Path, checkpoint: SafetensorsCheckpoint, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run on the CPU: the same types, shapes and numbers, other kernels."""
    in_floats(monkeypatch)
    runner = Runner(export_in_memory(checkpoint, recipe), checkpoint.spec, CAPACITY)
    found = runner.read(prompt(), ODD_CHUNKS)
    assert found.dtype == runner.pool.dtype == np.float16
    expected = dequantised_logits(folder, checkpoint, Plan(recipe), prompt())
    np.testing.assert_allclose(found, expected, atol=0.02, rtol=0)


def test_fp4_experts_lack_nothing_but_a_kernel_on_the_cpu(checkpoint: SafetensorsCheckpoint) -> None:
    exported = export_in_memory(checkpoint, Recipe.CUDA_FP4)
    assert exported.ir_version >= 12, "older ones do not know FLOAT8E8M0"
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED.*QMoE.*not supported in CPUExecutionProvider"):
        Runner(exported, checkpoint.spec, CAPACITY)
    (mixture,) = [node for node in exported.graph.node if node.name == "/layers.1/experts"]
    shapes = {tensor.name: (tuple(tensor.dims), tensor.data_type) for tensor in exported.graph.initializer}
    count, hidden, inner, block = TINY.experts, TINY.hidden, TINY.intermediate, 32
    byte, power, single = onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT8E8M0, onnx.TensorProto.FLOAT
    half = onnx.TensorProto.FLOAT16
    assert [shapes.get(name) for name in mixture.input] == [
        *(None, None),
        *(((count, hidden, inner), byte), ((count, 2 * inner, hidden // block), power), ((count, 2 * inner), half)),
        *(((count, inner, hidden // 2), byte), ((count, hidden, inner // block), power), ((count, hidden), half)),
        *([None] * 7),
        *[((count,), single)] * 2,
    ]


@pytest.mark.parametrize("recipe", [Recipe.FP32, Recipe.CUDA_INT8, Recipe.CPU_MXFP4])
def test_nodes_are_named_by_layer_and_part_each_once(checkpoint: SafetensorsCheckpoint, recipe: Recipe) -> None:
    names = [node.name for node in build_graph(checkpoint.spec, checkpoint.tensors, Plan(recipe)).nodes]
    assert len(set(names)) == len(names)
    parts = {"attention_norm", "attention/qkv", "attention", "attention/output", "mlp_norm", "mlp/router", "experts"}
    assert {f"/layers.{layer}/{part}" for layer in range(TINY.layers) for part in parts} < set(names)
    assert {"/embedding", "/head/norm", "/head"} < set(names)
