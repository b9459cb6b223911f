from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from core.errors import ReleaseError
from core.manifest import MANIFEST_NAME, Manifest, decode_manifest, model_of
from export.build import DATA_FILE, GRAPH_FILE, Order, export, release_digest
from export.errors import SourceError
from export.gguf import GgufFile
from export.graph_llama import build_graph
from export.llama_spec import read_spec
from export.recipes import Recipe
from export.verify import WrittenRelease, check_weights
from export.writer import PAGE_BYTES, matches
from tests.export.graph_runner import log_softmax, logits_of
from tests.export.llama_reference import logits as reference_logits
from tests.export.tiny_gguf import TEMPLATE, TOKENS, TinyLlama

PROMPT = [5, 77, 200, 31, 31, 8, 140, 2, 260, 99]


def export_tiny(model: TinyLlama, folder: Path, recipe: Recipe) -> Manifest:
    source = model.write(folder / "tiny.gguf")
    return export(Order(source, folder / "release", "tiny", recipe)).manifest


def compute_in_float32(graph: Path) -> None:
    """Take away the int8 activations, so that what is left is the arithmetic of the weights' form."""
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    graph.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("recipe", Recipe)
def test_the_graph_computes_what_the_formulas_say(tmp_path: Path, recipe: Recipe, tied_head: bool) -> None:
    model = TinyLlama(tied_head=tied_head)
    manifest = export_tiny(model, tmp_path, recipe)
    compute_in_float32(tmp_path / "release" / GRAPH_FILE)
    found = logits_of(tmp_path / "release" / GRAPH_FILE, manifest.kv, PROMPT)
    np.testing.assert_allclose(found, reference_logits(model, PROMPT), atol=2e-4, rtol=1e-4)


def test_the_served_form_stays_near_the_formulas_with_int8_activations(tmp_path: Path) -> None:
    model = TinyLlama()
    manifest = export_tiny(model, tmp_path, Recipe.GGUF_EXACT)
    expected = log_softmax(reference_logits(model, PROMPT))
    found = log_softmax(logits_of(tmp_path / "release" / GRAPH_FILE, manifest.kv, PROMPT))
    divergence = (np.exp(expected) * (expected - found)).sum(-1).mean()
    assert 0 < divergence < 0.05


def test_sizes_are_read_from_the_file_and_nothing_is_taken_for_granted(tmp_path: Path) -> None:
    model = TinyLlama(layers=1, hidden=96, heads=3, kv_heads=1, intermediate=32, context_tokens=50)
    manifest = export_tiny(model, tmp_path, Recipe.GGUF_PARITY)
    assert (manifest.context_tokens, manifest.kv.layers, manifest.kv.kv_heads, manifest.kv.head_dim) == (50, 1, 1, 32)
    found = logits_of(tmp_path / "release" / GRAPH_FILE, manifest.kv, PROMPT)
    np.testing.assert_allclose(found, reference_logits(model, PROMPT), atol=2e-4, rtol=1e-4)


def test_the_manifest_lists_every_file_and_tells_what_was_checked(tmp_path: Path) -> None:
    manifest = export_tiny(TinyLlama(), tmp_path, Recipe.GGUF_EXACT)
    release = tmp_path / "release"
    assert decode_manifest((release / MANIFEST_NAME).read_bytes(), "here") == manifest
    assert {file.path for file in manifest.files} | {MANIFEST_NAME} == {path.name for path in release.iterdir()}
    assert all(matches(release, file) for file in manifest.files)
    assert (manifest.variant, manifest.stop_ids, manifest.bos_id) == ("gguf-exact", [2, 0], 1)
    assert manifest.vocab_size == manifest.tokenizer_size == len(TOKENS)
    assert (release / manifest.chat_template).read_text() == TEMPLATE
    assert "real number" in manifest.claims["weights"]
    assert manifest.batch_invariant == all(
        manifest.claims[name].startswith("bit-identical") for name in ("chunks", "batches")
    )


def test_the_graph_has_the_inputs_and_outputs_of_abi_1(tmp_path: Path) -> None:
    export_tiny(TinyLlama(layers=1), tmp_path, Recipe.GGUF_EXACT)
    model = onnx.load(tmp_path / "release" / GRAPH_FILE, load_external_data=False)
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    outputs = {value.name: value.type.tensor_type for value in model.graph.output}
    assert list(inputs) == [
        *("input_ids", "seqlens_k", "total_length", "logits_indices"),
        *("past_key.0", "past_value.0"),
    ]
    assert list(outputs) == ["logits", "present_key.0", "present_value.0"]
    kinds = {name: (kind.elem_type, len(kind.shape.dim)) for name, kind in (inputs | outputs).items()}
    int64, int32, float32 = onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.FLOAT
    assert kinds["input_ids"] == (int64, 2)
    assert kinds["seqlens_k"] == (int32, 1)
    assert kinds["total_length"] == (int32, 0)
    assert kinds["logits_indices"] == (int64, 1)
    assert kinds["logits"] == (float32, 2)
    assert kinds["past_key.0"] == kinds["present_value.0"] == (float32, 4)


def test_the_graph_says_where_it_comes_from(tmp_path: Path) -> None:
    manifest = export_tiny(TinyLlama(layers=1), tmp_path, Recipe.GGUF_EXACT)
    model = onnx.load(tmp_path / "release" / GRAPH_FILE, load_external_data=False)
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "recipe": "gguf-exact",
        "release": manifest.release,
        "source_sha256": manifest.source.sha256,
        "exporter_version": manifest.exporter_version,
        "graph_abi": "1",
    }


def test_weights_lie_on_pages_and_a_tied_head_lies_there_once(tmp_path: Path) -> None:
    export_tiny(TinyLlama(), tmp_path, Recipe.GGUF_EXACT)
    written = WrittenRelease.open(tmp_path / "release", GRAPH_FILE)
    places = {
        name: {entry.key: entry.value for entry in tensor.external_data}
        for name, tensor in written.initializers.items()
        if tensor.external_data
    }
    assert all(int(place["offset"]) % PAGE_BYTES == 0 for place in places.values())
    assert places["embedding.table"] == places["embedding.codes"]


def test_recipes_make_variants_of_one_release(tmp_path: Path) -> None:
    manifests = []
    for recipe in Recipe:
        (tmp_path / recipe).mkdir()
        manifests.append(export_tiny(TinyLlama(), tmp_path / recipe, recipe))
    assert manifests[0].release == manifests[1].release
    assert manifests[0].variant != manifests[1].variant
    assert model_of(manifests[0].release) == "tiny"


def test_whatever_makes_another_model_makes_another_release() -> None:
    first = release_digest("00", b"tokenizer", "template", 64)
    others = [
        release_digest("01", b"tokenizer", "template", 64),
        release_digest("00", b"tokenizes", "template", 64),
        release_digest("00", b"tokenizer", "templates", 64),
        release_digest("00", b"tokenizer", "template", 65),
    ]
    assert len({first, *others}) == 5


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path, tiny_gguf: Path) -> None:
    first, second = (
        export(Order(tiny_gguf, tmp_path / name, "tiny", Recipe.GGUF_EXACT)).manifest for name in ("a", "b")
    )
    assert first == second


def test_a_release_that_is_up_to_date_is_left_alone_unless_forced(tmp_path: Path, tiny_gguf: Path) -> None:
    order = Order(tiny_gguf, tmp_path / "release", "tiny", Recipe.GGUF_EXACT)
    assert export(order).fresh
    before = (order.out / DATA_FILE).stat().st_ino
    assert not export(order).fresh
    assert (order.out / DATA_FILE).stat().st_ino == before
    assert export(Order(tiny_gguf, order.out, "tiny", Recipe.GGUF_EXACT, force=True)).fresh
    assert (order.out / DATA_FILE).stat().st_ino != before


@pytest.mark.parametrize("recipe", [Recipe.GGUF_EXACT, Recipe.GGUF_PARITY])
def test_a_release_that_is_damaged_or_of_another_recipe_is_written_again(
    tmp_path: Path, tiny_gguf: Path, recipe: Recipe
) -> None:
    out = tmp_path / "release"
    export(Order(tiny_gguf, out, "tiny", Recipe.GGUF_EXACT))
    with (out / DATA_FILE).open("r+b") as file:
        file.write(b"\xff")
    outcome = export(Order(tiny_gguf, out, "tiny", recipe))
    assert outcome.fresh
    assert all(matches(out, file) for file in outcome.manifest.files)


def test_verification_notices_one_flipped_bit(tmp_path: Path, tiny_gguf: Path) -> None:
    export(Order(tiny_gguf, tmp_path / "release", "tiny", Recipe.GGUF_EXACT))
    source = GgufFile(tiny_gguf)
    spec = read_spec(source.metadata, source.tensors)
    weights = build_graph(spec, Recipe.GGUF_EXACT).weights
    written = WrittenRelease.open(tmp_path / "release", GRAPH_FILE)
    check_weights(written, weights, Recipe.GGUF_EXACT, source)
    for name, sentence in [
        ("layers.1.mlp.down.scales", "weights of 'layers.1.mlp.down' cannot"),
        ("rotary.sin", "'rotary.sin' was not written"),
        ("head.norm", "'head.norm' was not written"),
    ]:
        place = {entry.key: entry.value for entry in written.initializers[name].external_data}
        with (tmp_path / "release" / DATA_FILE).open("r+b") as file:
            file.seek(int(place["offset"]))
            kept = file.read(4)
            file.seek(int(place["offset"]))
            file.write(kept[:3] + bytes([kept[3] ^ 0x40]))  # the highest bit of a float's exponent
            file.flush()
            with pytest.raises(SourceError, match=sentence):
                check_weights(written, weights, Recipe.GGUF_EXACT, source)
            file.seek(int(place["offset"]))
            file.write(kept)


def test_a_context_too_short_to_be_checked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="context of 17 tokens"):
        export_tiny(TinyLlama(context_tokens=17), tmp_path, Recipe.GGUF_EXACT)
    assert not (tmp_path / "release").exists()


def test_a_bad_model_name_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="model name 'Bad Name'"):
        export(Order(tmp_path / "missing.gguf", tmp_path / "release", "Bad Name", Recipe.GGUF_EXACT))
