"""Written graphs run here: the exporter's own runs, and a node's on the same release."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from core.frames import Sampling
from core.manifest import FORMAT, GRAPH_ABI, Golden, KvShape, Manifest, Source
from edge_node.engine.sampling import sample
from edge_node.engine.step import Chunk, Decode, StepPlan
from edge_node.runtime.runner import Runner
from export.errors import SourceError, TargetError
from export.graphs.families import build_graph
from export.recipes import Plan, Recipe
from export.sources.checkpoint import Checkpoint
from export.sources.opening import open_checkpoint
from export.trial.run import CannotRun, Ran, Reference, compare, measure, retrace_all, text_ids
from tests.export.graph_runner import export_in_memory
from tests.tools.gpt_oss_checkpoint import TINY, write_checkpoint

ALONE = Reference("nothing", None)


@dataclass(frozen=True)
class Written:
    """A release's folder without a manifest, and the manifest as far as it is known."""

    folder: Path
    manifest: Manifest
    window_tokens: int

    @property
    def graph(self) -> Path:
        return self.folder / self.manifest.graph

    def measured(self, reference: Reference = ALONE) -> Ran:
        ran = measure(self.folder, self.manifest, self.window_tokens, reference)
        assert isinstance(ran, Ran), ran.reason
        return ran


def write(folder: Path, checkpoint: Checkpoint, recipe: Recipe) -> Written:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(export_in_memory(checkpoint, recipe).SerializeToString())
    (folder / "tokenizer.json").write_bytes(checkpoint.speech.tokenizer_json)
    spec, speech, plan = checkpoint.spec, checkpoint.speech, Plan(recipe)
    manifest = Manifest(
        format=FORMAT,
        graph_abi=GRAPH_ABI,
        model="tiny",
        release="tiny@" + "0" * 12,
        variant=plan.variant,
        family=spec.family,
        exporter_version="0",
        source=Source(checkpoint.name, "0" * 64, checkpoint.architecture),
        context_tokens=spec.context_tokens,
        vocab_size=spec.vocab,
        tokenizer_size=speech.size,
        kv=KvShape(spec.layers, spec.kv_heads, spec.head_dim, "float16" if plan.floats == "float16" else "float32"),
        stop_ids=list(speech.stop_ids),
        bos_id=speech.bos_id,
        batch_invariant=False,
        device=recipe.device.value,
        operators=build_graph(spec, checkpoint.tensors, plan).operators(),
        speech="harmony",
        graph="model.onnx",
        tokenizer="tokenizer.json",
        chat_template=None,
        quality=None,
        files=[],
        claims={},
        golden=[],
    )
    return Written(folder, manifest, max(spec.windows))


@pytest.fixture(scope="module")
def llama(tiny_gguf: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_gguf))


@pytest.fixture(scope="module")
def exact(llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("run") / "exact", llama, Recipe.GGUF_EXACT)


@pytest.fixture(scope="module")
def ran(exact: Written) -> Ran:
    return exact.measured()


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("run") / "gpt-oss"
    write_checkpoint(folder, TINY)
    return open_checkpoint(str(folder))


def with_golden(written: Written, golden: tuple[Golden, ...]) -> Manifest:
    return msgspec.structs.replace(written.manifest, golden=list(golden))


def test_a_llama_with_blocks_is_invariant(ran: Ran) -> None:
    assert (ran.invariance.chunks, ran.invariance.batches) == (True, True)


def test_the_same_golden_prompts_come_out_again(exact: Written, ran: Ran) -> None:
    assert len(ran.golden) == 4
    assert all(len(golden.ids) > 0 and golden.min_margin >= 0 for golden in ran.golden)
    assert all("onnxruntime" in golden.made_by for golden in ran.golden)
    again = retrace_all(exact.folder, with_golden(exact, ran.golden))
    assert not isinstance(again, CannotRun)
    assert all(one.is_reproduced for one in again)


def test_a_node_gives_the_very_ids_of_the_golden_prompts(exact: Written, ran: Ran) -> None:
    with ThreadPoolExecutor(max_workers=1) as thread:  # it will round denormals to zero
        thread.submit(expect_the_ids_of_a_node, exact, ran.golden).result()


def expect_the_ids_of_a_node(written: Written, goldens: Sequence[Golden]) -> None:
    manifest = written.manifest
    runner = Runner.open(written.folder, manifest, "cpu", 1, 2, manifest.context_tokens)
    for golden in goldens:
        prompt, ids = golden.prompt_ids, list[int]()
        rows = runner.run(StepPlan(0, Chunk(0, 0, prompt, [len(prompt) - 1]), None, 0.0)).chunk_logits
        while rows is not None and len(ids) < len(golden.ids):
            ids.append(sample(rows[0], Sampling(0.0), manifest.tokenizer_size, 0, len(ids)))
            step = Decode(0, ids[-1:], [len(prompt) + len(ids)], [0])
            rows = runner.run(StepPlan(0, None, step, 0.0)).decode_logits
        assert ids == golden.ids


def test_golden_prompts_of_another_model_are_broken(exact: Written, ran: Ran) -> None:
    first = ran.golden[0]
    ids = [*first.ids[:3], (first.ids[3] + 100) % exact.manifest.tokenizer_size, *first.ids[4:]]
    again = retrace_all(exact.folder, with_golden(exact, (msgspec.structs.replace(first, ids=ids),)))
    assert not isinstance(again, CannotRun)
    assert again[0].first_difference == 3
    assert not again[0].is_explained


def test_a_release_is_compared_with_its_reference_and_nothing_is_left_behind(
    exact: Written, ran: Ran, llama: Checkpoint, tmp_path: Path
) -> None:
    reference = write(tmp_path / "fp32", llama, Recipe.FP32)
    quality = exact.measured(Reference("in float32", reference.graph)).quality
    assert quality.reference == "in float32"
    assert quality.score.perplexity == ran.quality.score.perplexity
    distance = quality.score.distance
    assert distance is not None
    assert 0 < distance.kl_divergence < 0.01
    assert distance.top1_agreement > 0.9
    itself = reference.measured(Reference("itself", reference.graph)).quality.score.distance
    assert itself is not None
    assert itself.kl_divergence == itself.largest_difference == 0
    assert sorted(path.name for path in reference.folder.iterdir()) == ["model.onnx", "tokenizer.json"]


def test_a_reference_that_cannot_run_here_is_done_without(exact: Written, llama: Checkpoint, tmp_path: Path) -> None:
    reference = write(tmp_path / "fp32", llama, Recipe.FP32)
    with_a_hole(reference.folder)
    quality = exact.measured(Reference("in float32", reference.graph)).quality
    assert quality.score.distance is None
    assert quality.reference.startswith("none, the float32 form cannot run here: Running it takes 4398.5 GB")


def with_a_hole(folder: Path) -> Path:
    """A file larger than any memory, which takes no room."""
    (folder / "model.onnx.data").touch()
    os.truncate(folder / "model.onnx.data", 4 << 40)
    return folder


def test_without_a_reference_the_label_says_why(ran: Ran) -> None:
    assert (ran.quality.reference, ran.quality.score.distance) == (ALONE.label, None)
    assert ran.quality.score.positions == 64  # the context


def test_logits_of_a_file_are_compared_position_by_position(exact: Written, tmp_path: Path) -> None:
    ids = text_ids(exact.folder, exact.manifest)[:20]
    expected = np.zeros((19, exact.manifest.vocab_size), np.float32)
    np.save(tmp_path / "expected.npy", expected)
    found = compare(exact.folder, exact.manifest, ids, tmp_path / "expected.npy")
    assert not isinstance(found, CannotRun)
    assert found.distance is not None
    assert found.distance.perplexity == pytest.approx(exact.manifest.tokenizer_size)


def test_a_model_with_experts_and_windows_runs(gpt_oss: Checkpoint, tmp_path: Path) -> None:
    written = write(tmp_path / "int8", gpt_oss, Recipe.CPU_INT8)
    assert written.window_tokens == TINY.window
    again = retrace_all(written.folder, with_golden(written, written.measured().golden))
    assert not isinstance(again, CannotRun)
    assert all(one.is_explained for one in again)


def test_a_graph_in_float16_runs(llama: Checkpoint, exact: Written, tmp_path: Path) -> None:
    written = write(tmp_path / "half", llama, Recipe.CUDA_INT8)
    distance = written.measured(Reference("exact", exact.graph)).quality.score.distance
    assert distance is not None
    assert distance.kl_divergence < 0.01


def test_an_operator_of_our_own_is_named(gpt_oss: Checkpoint, tmp_path: Path) -> None:
    written = write(tmp_path / "mxfp4", gpt_oss, Recipe.CPU_MXFP4)
    found = measure(written.folder, written.manifest, written.window_tokens, ALONE)
    assert found == CannotRun("ONNX Runtime does not have the operator edgechat.MoeMxfp4; a node brings it.")


def test_a_form_without_a_kernel_here_is_said_in_one_sentence(gpt_oss: Checkpoint, tmp_path: Path) -> None:
    written = write(tmp_path / "fp4", gpt_oss, Recipe.CUDA_FP4)
    found = measure(written.folder, written.manifest, written.window_tokens, ALONE)
    assert isinstance(found, CannotRun)
    assert "Failed to find kernel for com.microsoft.QMoE" in found.reason
    assert len(found.reason) < 200


def test_a_release_larger_than_the_memory_is_not_tried(exact: Written, tmp_path: Path) -> None:
    found = measure(with_a_hole(tmp_path), exact.manifest, 0, ALONE)
    assert isinstance(found, CannotRun)
    assert "takes 4398.5 GB of memory" in found.reason


def test_a_context_too_short_for_a_release_is_refused(exact: Written) -> None:
    short = msgspec.structs.replace(exact.manifest, context_tokens=47)
    with pytest.raises(SourceError, match="a release needs at least 48"):
        measure(exact.folder, short, 0, ALONE)


def test_a_graph_that_is_none_is_one_sentence(exact: Written, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    (tmp_path / "tokenizer.json").write_bytes((exact.folder / "tokenizer.json").read_bytes())
    with pytest.raises(TargetError, match=r"ONNX Runtime .* cannot run .*model\.onnx") as caught:
        measure(tmp_path, exact.manifest, 0, ALONE)
    assert "\n" not in caught.value.message


def with_graph(exact: Written, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of the release with a graph that was changed."""
    model = onnx.load(exact.graph)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    shutil.copy(exact.folder / "tokenizer.json", folder)
    return folder


def test_an_input_of_another_name_is_one_sentence(exact: Written, tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        next(value for value in model.graph.input if value.name == "logits_indices").name = "indices"
        for node in model.graph.node:
            node.input[:] = ["indices" if name == "logits_indices" else name for name in node.input]

    with pytest.raises(TargetError, match=r"ONNX Runtime .* cannot run .*model\.onnx") as caught:
        measure(with_graph(exact, tmp_path, rename), exact.manifest, 0, ALONE)
    assert "logits_indices" in caught.value.message


def test_a_graph_without_logits_is_refused(exact: Written, tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        next(value for value in model.graph.output if value.name == "logits").name = "other"
        for node in model.graph.node:
            node.output[:] = ["other" if name == "logits" else name for name in node.output]

    with pytest.raises(TargetError, match="has no cache or no logits"):
        measure(with_graph(exact, tmp_path, rename), exact.manifest, 0, ALONE)


def test_a_tokenizer_that_panics_is_one_sentence(exact: Written, tmp_path: Path) -> None:
    content = json.loads((exact.folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 10}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TargetError, match=r"tokenizer\.json does not cut text into ids"):
        text_ids(tmp_path, exact.manifest)


def test_a_tokenizer_that_is_none_is_one_sentence(exact: Written, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TargetError, match=r"tokenizer\.json does not cut text into ids"):
        text_ids(tmp_path, exact.manifest)


def test_ids_that_the_manifest_does_not_know_are_refused(exact: Written) -> None:
    small = msgspec.structs.replace(exact.manifest, tokenizer_size=5)
    with pytest.raises(TargetError, match="the manifest knows 5 ids"):
        text_ids(exact.folder, small)


def test_a_manifest_of_other_sizes_is_refused(exact: Written, ran: Ran) -> None:
    other = msgspec.structs.replace(with_golden(exact, ran.golden), vocab_size=exact.manifest.vocab_size + 1)
    with pytest.raises(TargetError, match="the manifest says"):
        retrace_all(exact.folder, other)


def test_the_caller_s_rounding_is_left_alone(ran: Ran) -> None:
    assert sys.float_info.min / 2 > 0
