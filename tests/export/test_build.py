from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from core.errors import ReleaseError
from core.manifest import MANIFEST_NAME, Manifest, decode_manifest, model_of
from export.build import QUALITY_FILE, Order, export, release_digest
from export.errors import SourceError, TargetError
from export.recipes import Dense, Recipe
from export.release import weights
from export.release.data import DATA_FILE, GRAPH_FILE
from export.release.writer import PAGE_BYTES, count_intact, matches
from export.sources.checkpoint import Checkpoint
from export.sources.opening import open_checkpoint
from export.sources.speech import Speech
from export.spec import Kind
from export.trial.quality_report import QualityReport, decode_report
from tests.export.graph_runner import export_in_memory
from tests.export.running import contents
from tests.export.tiny_gguf import TEMPLATE, TOKENS, TinyLlama, tiny_q4_k_m
from tests.tools.gpt_oss_checkpoint import TINY, write_checkpoint

GPT_OSS_RECIPES = [recipe for recipe in Recipe if not recipe.value.startswith("gguf-")]
GGUF_RECIPES = [recipe for recipe in Recipe if recipe not in (Recipe.CUDA_FP4, Recipe.CPU_MXFP4)]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-gpt-oss", TINY, tokenizer="tiny")


@pytest.fixture(scope="module")
def q4_k_m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_q4_k_m().write(tmp_path_factory.mktemp("gguf") / "q4_k_m.gguf")


def make(source: Path, out: Path, recipe: Recipe, dense: Dense = Dense.INT8, run: bool = False) -> Manifest:
    return export(Order(str(source), out, "tiny", recipe, dense, run=run)).manifest


def graph_in(release: Path, weights_too: bool = False) -> onnx.ModelProto:
    return onnx.load(release / GRAPH_FILE, load_external_data=weights_too)


def quality_in(release: Path) -> QualityReport:
    return decode_report((release / QUALITY_FILE).read_bytes(), QUALITY_FILE)


def raw_weights(model: onnx.ModelProto) -> dict[str, tuple[int, Sequence[int], bytes]]:
    return {tensor.name: (tensor.data_type, tensor.dims, tensor.raw_data) for tensor in model.graph.initializer}


@pytest.mark.parametrize("dense", Dense)
@pytest.mark.parametrize("recipe", GPT_OSS_RECIPES)
def test_what_is_streamed_is_what_encoding_the_whole_gives(
    tmp_path: Path, gpt_oss: Path, recipe: Recipe, dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SLICE_WEIGHTS", 1000)  # ten rows: several slices, and a last one of another size
    make(gpt_oss, tmp_path / "release", recipe, dense)
    expected = export_in_memory(open_checkpoint(str(gpt_oss)), recipe, dense)
    found = graph_in(tmp_path / "release", weights_too=True)
    assert raw_weights(found) == raw_weights(expected)
    assert list(found.graph.node) == list(expected.graph.node)


@pytest.mark.parametrize("recipe", GGUF_RECIPES)
def test_blocks_of_a_gguf_are_streamed_just_so(
    tmp_path: Path, q4_k_m: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SLICE_WEIGHTS", 5000)
    make(q4_k_m, tmp_path / "release", recipe)
    expected = export_in_memory(open_checkpoint(str(q4_k_m)), recipe)
    assert raw_weights(graph_in(tmp_path / "release", weights_too=True)) == raw_weights(expected)


def test_the_manifest_lists_every_file_and_tells_what_was_checked(tmp_path: Path, tiny_gguf: Path) -> None:
    release = tmp_path / "release"
    manifest = make(tiny_gguf, release, Recipe.GGUF_EXACT, run=True)
    assert decode_manifest((release / MANIFEST_NAME).read_bytes(), "here") == manifest
    assert {file.path for file in manifest.files} | {MANIFEST_NAME} == {path.name for path in release.iterdir()}
    assert all(matches(release, file) for file in manifest.files)
    assert (manifest.variant, manifest.stop_ids, manifest.bos_id) == ("gguf-exact", [2, 0], 1)
    assert manifest.vocab_size == manifest.tokenizer_size == len(TOKENS)
    assert (manifest.device, manifest.operators, manifest.speech) == ("cpu", [], "chat_template")
    assert manifest.chat_template is not None
    assert (release / manifest.chat_template).read_text() == TEMPLATE
    assert manifest.claims["weights"].startswith("every weight is the very number")
    assert manifest.batch_invariant == all(
        manifest.claims[name].startswith("bit-identical") for name in ("chunks", "batches")
    )
    assert manifest.golden
    assert all(golden.prompt_ids and golden.ids for golden in manifest.golden)


def test_a_gpt_oss_release_speaks_harmony_and_asks_for_what_it_needs(tmp_path: Path, gpt_oss: Path) -> None:
    manifest = make(gpt_oss, tmp_path / "release", Recipe.CPU_MXFP4, run=True)
    assert (manifest.family, manifest.speech, manifest.chat_template) == ("gpt_oss", "harmony", None)
    assert manifest.operators == ["edgechat.MoeMxfp4"]
    assert (manifest.batch_invariant, manifest.golden) == (False, [])
    assert manifest.claims["batches"].startswith("not measured: ONNX Runtime does not have the operator")


def test_a_release_for_a_gpu_claims_nothing_that_only_a_gpu_could_show(tmp_path: Path, tiny_gguf: Path) -> None:
    manifest = make(tiny_gguf, tmp_path / "release", Recipe.CUDA_INT8, run=True)
    assert (manifest.device, manifest.kv.dtype, manifest.batch_invariant) == ("cuda", "float16", False)
    assert manifest.claims["chunks"].startswith("not measured: ")


def test_the_graph_says_where_it_comes_from(tmp_path: Path, gpt_oss: Path) -> None:
    manifest = make(gpt_oss, tmp_path / "release", Recipe.CPU_INT8, Dense.EXACT)
    assert manifest.variant == "cpu-int8-dense-exact"
    assert {entry.key: entry.value for entry in graph_in(tmp_path / "release").metadata_props} == {
        "recipe": "cpu-int8",
        "dense": "exact",
        "release": manifest.release,
        "source_sha256": manifest.source.sha256,
        "exporter_version": manifest.exporter_version,
        "graph_abi": "1",
    }


def test_weights_lie_on_pages_where_chunks_begin_and_a_tied_head_lies_there_once(
    tmp_path: Path, tiny_gguf: Path
) -> None:
    manifest = make(tiny_gguf, tmp_path / "release", Recipe.GGUF_EXACT)
    (data,) = (file for file in manifest.files if file.path == DATA_FILE)
    offsets = {
        tensor.name: int(entry.value)
        for tensor in graph_in(tmp_path / "release").graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    }
    begins = {sum(chunk.size_bytes for chunk in data.chunks[:index]) for index in range(len(data.chunks))}
    assert all(offset % PAGE_BYTES == 0 for offset in offsets.values())
    assert set(offsets.values()) == begins
    assert offsets["embedding.table"] == offsets["embedding.codes"]


def test_quality_tells_what_each_tensor_lost(tmp_path: Path, gpt_oss: Path) -> None:
    make(gpt_oss, tmp_path / "exact", Recipe.CPU_INT8, Dense.EXACT)
    make(gpt_oss, tmp_path / "lossy", Recipe.CPU_INT4)
    exact, lossy = quality_in(tmp_path / "exact"), quality_in(tmp_path / "lossy")
    assert exact.tensors.keys() == lossy.tensors.keys() == open_checkpoint(str(gpt_oss)).tensors.keys()
    assert all(tensor.exact and tensor.max_error == 0 for tensor in exact.tensors.values())
    experts = lossy.tensors["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.form == "4-bit blocks of 32"
    assert experts.weights == TINY.experts * 2 * TINY.intermediate * TINY.hidden
    assert 0.05 < experts.relative_rms < 0.1
    assert 0 < lossy.tensors["lm_head.weight"].relative_rms < 0.01
    assert lossy.tensors["model.layers.0.mlp.router.weight"].exact
    assert lossy.totals.bytes == (tmp_path / "lossy" / DATA_FILE).stat().st_size
    assert lossy.run == "not measured: the export was made with --no-run"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe.CUDA_FP4, ", all experts among them; "),
        (Recipe.CPU_INT8, ", all experts among them; "),
        (Recipe.CPU_INT4, ", experts not among them; "),
        (Recipe.FP32, "every weight is the very number that the source stands for"),
    ],
)
def test_the_claim_says_whether_the_experts_came_through(
    tmp_path: Path, gpt_oss: Path, recipe: Recipe, words: str
) -> None:
    assert words in make(gpt_oss, tmp_path / "release", recipe).claims["weights"]


def test_what_running_it_showed_stands_in_the_quality_report(tmp_path: Path, tiny_gguf: Path) -> None:
    make(tiny_gguf, tmp_path / "release", Recipe.GGUF_EXACT, run=True)
    run = quality_in(tmp_path / "release").run
    assert not isinstance(run, str)
    assert run.score.distance is not None
    assert 0 < run.score.distance.kl_divergence < 0.05  # the activations are rounded to 8 bits
    assert not (tmp_path / ".release.partial").exists()


def test_recipes_make_variants_of_one_release(tmp_path: Path, gpt_oss: Path) -> None:
    first, second = (make(gpt_oss, tmp_path / recipe, recipe) for recipe in (Recipe.CPU_INT8, Recipe.CUDA_FP4))
    assert first.release == second.release
    assert first.variant != second.variant
    assert model_of(first.release) == "tiny"


def test_other_shards_of_the_same_weights_are_the_same_release(tmp_path: Path, gpt_oss: Path) -> None:
    other = write_checkpoint(tmp_path / "one-shard", replace(TINY, shard_bytes=1 << 30), tokenizer="tiny")
    assert len(list(other.glob("*.safetensors"))) < len(list(gpt_oss.glob("*.safetensors")))
    first, second = (make(folder, tmp_path / f"of-{folder.name}", Recipe.CPU_INT8) for folder in (gpt_oss, other))
    assert first.release == second.release
    assert first.source.sha256 == second.source.sha256


def test_one_bit_of_one_weight_makes_another_release(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", TINY, tokenizer="tiny")
    before = make(folder, tmp_path / "before", Recipe.CPU_INT8)
    extent = open_checkpoint(str(folder)).extents("model.layers.3.mlp.experts.down_proj")[0]
    data = bytearray(extent.path.read_bytes())
    data[extent.offset + extent.size_bytes - 1] ^= 1
    extent.path.write_bytes(data)
    after = make(folder, tmp_path / "after", Recipe.CPU_INT8)
    assert before.release != after.release
    assert {file.path for file in before.files if file not in after.files} == {DATA_FILE, GRAPH_FILE}


def test_whatever_makes_another_model_makes_another_release(gpt_oss: Path) -> None:
    checkpoint = open_checkpoint(str(gpt_oss))

    def changed(**changes: object) -> Checkpoint:
        return replace(checkpoint, **changes)  # type: ignore[type-var]

    def speaking(**changes: object) -> Checkpoint:
        speech: Speech = replace(checkpoint.speech, **changes)  # type: ignore[arg-type]
        return changed(speech=speech)

    digests = [
        release_digest("00", checkpoint),
        release_digest("01", checkpoint),
        release_digest("00", speaking(tokenizer_json=b"{}")),
        release_digest("00", speaking(chat_template="{{ messages }}")),
        release_digest("00", changed(spec=replace(checkpoint.spec, context_tokens=77))),
        release_digest("00", changed(spec=replace(checkpoint.spec, norm_epsilon=1e-6))),
    ]
    assert len(set(digests)) == len(digests)
    assert release_digest("00", changed(name="another name")) == digests[0]


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path, tiny_gguf: Path) -> None:
    for name in ("a", "b"):
        make(tiny_gguf, tmp_path / name, Recipe.GGUF_EXACT, run=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_release_that_is_up_to_date_is_left_alone_unless_forced(tmp_path: Path, tiny_gguf: Path) -> None:
    order = Order(str(tiny_gguf), tmp_path / "release", "tiny", Recipe.GGUF_EXACT, run=False)
    assert export(order).fresh
    before = (order.out / DATA_FILE).stat().st_ino
    assert not export(order).fresh
    assert (order.out / DATA_FILE).stat().st_ino == before
    assert export(replace(order, force=True)).fresh
    assert (order.out / DATA_FILE).stat().st_ino != before


def test_a_release_that_was_never_run_is_not_up_to_date_for_who_wants_it_run(tmp_path: Path, tiny_gguf: Path) -> None:
    order = Order(str(tiny_gguf), tmp_path / "release", "tiny", Recipe.GGUF_EXACT, run=False)
    export(order)
    assert export(replace(order, run=True)).fresh
    assert not export(replace(order, run=True)).fresh
    assert not export(order).fresh


@pytest.mark.parametrize(
    "change", [{"recipe": Recipe.GGUF_PARITY}, {"model": "other"}, {"source": "another"}, {"recipe": Recipe.GGUF_EXACT}]
)
def test_a_release_that_is_damaged_or_of_something_else_is_written_again(
    tmp_path: Path, tiny_gguf: Path, change: dict[str, str]
) -> None:
    order = Order(str(tiny_gguf), tmp_path / "release", "tiny", Recipe.GGUF_EXACT, run=False)
    export(order)
    if change == {"recipe": Recipe.GGUF_EXACT}:  # the very same, but for its last byte
        data = bytearray((order.out / DATA_FILE).read_bytes())
        data[-1] ^= 1
        (order.out / DATA_FILE).write_bytes(data)
    if "source" in change:
        change = {"source": str(TinyLlama(tied_head=False).write(tmp_path / "other.gguf"))}
    outcome = export(replace(order, **change))  # type: ignore[arg-type]
    assert outcome.fresh
    assert all(matches(order.out, file) for file in outcome.manifest.files)


def test_a_release_of_an_older_format_is_replaced(tmp_path: Path, tiny_gguf: Path) -> None:
    order = Order(str(tiny_gguf), tmp_path / "release", "tiny", Recipe.GGUF_EXACT, run=False)
    export(order)
    manifest = json.loads((order.out / MANIFEST_NAME).read_bytes())
    (order.out / MANIFEST_NAME).write_text(json.dumps(manifest | {"format": 1}))
    assert export(order).fresh


def test_without_a_recipe_one_is_chosen_and_the_reason_said(tmp_path: Path, tiny_gguf: Path) -> None:
    told: list[str] = []
    outcome = export(Order(str(tiny_gguf), tmp_path / "release", "tiny", run=False), told.append)
    assert told[0].startswith(f"--recipe auto takes {outcome.manifest.variant}: ")


def test_an_unchanged_tensor_keeps_its_chunks_when_another_one_grows(tmp_path: Path) -> None:
    """What delta transfer lives on: a model fine-tuned with a longer context has longer tables, nothing else."""
    files = []
    for context in (64, 4096):
        source = TinyLlama(context_tokens=context).write(tmp_path / f"{context}.gguf")
        manifest = make(source, tmp_path / str(context), Recipe.GGUF_EXACT)
        files += [file for file in manifest.files if file.path == DATA_FILE]
    shorter, longer = ({chunk.sha256 for chunk in file.chunks} for file in files)
    assert len(shorter - longer) <= 2
    assert count_intact(tmp_path / "64" / DATA_FILE, files[0].chunks) == len(files[0].chunks)


def test_a_context_too_short_to_be_tried_is_refused(tmp_path: Path) -> None:
    source = TinyLlama(context_tokens=17).write(tmp_path / "tiny.gguf")
    with pytest.raises(SourceError, match="context of 17 tokens"):
        make(source, tmp_path / "release", Recipe.GGUF_EXACT, run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_bad_model_name_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="model name 'Bad Name'"):
        export(Order(str(tmp_path / "missing.gguf"), tmp_path / "release", "Bad Name", Recipe.GGUF_EXACT))


@pytest.mark.parametrize("by_folder", [True, False])
def test_a_checkpoint_is_not_replaced_by_its_release(tmp_path: Path, by_folder: bool) -> None:
    model = tmp_path / "model"
    model.mkdir()
    source = TinyLlama().write(model / "tiny.gguf")
    listing = {"format": 2, "release": "tiny@1", "files": [{"path": source.name}]}
    (model / MANIFEST_NAME).write_text(json.dumps(listing))
    with pytest.raises(TargetError, match="would clear away the checkpoint's"):
        make(model if by_folder else source, model, Recipe.GGUF_EXACT)
    assert source.exists()


@pytest.mark.parametrize("recipe", [Recipe.GGUF_EXACT, Recipe.GGUF_PARITY])
def test_a_recipe_for_quantised_checkpoints_refuses_one_that_is_not(tmp_path: Path, recipe: Recipe) -> None:
    kinds = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), Kind.F16)
    source = TinyLlama(kinds=kinds | {"token_embd": Kind.F16, "output": Kind.F16}).write(tmp_path / "f16.gguf")
    with pytest.raises(
        SourceError, match=f"{recipe} carries the quantised tensors of a GGUF, this checkpoint has none"
    ):
        make(source, tmp_path / "release", recipe)
    assert not (tmp_path / "release").exists()
