"""`verify` says what is wrong with a release, whatever it is, and that nothing is when nothing is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import onnx
import pytest

from core.manifest import MANIFEST_NAME, Chunk, KvShape, Manifest, ReleaseFile, Source, decode_manifest, encode_manifest
from export.build import Order, export
from export.checks.report import Check, Report, Verdict
from export.checks.source import check_source
from export.checks.verify import check_files, check_golden, verify
from export.errors import SourceError, TargetError
from export.recipes import Dense, Recipe
from export.sources.opening import open_checkpoint
from tests.export.tiny_gguf import TinyLlama
from tests.tools.gpt_oss_checkpoint import TINY, write_checkpoint
from tests.tools.hf_checkpoints import write_llama, write_qwen2

DATA = "model.onnx.data"
GRAPH = "model.onnx"
CONTENT = f"content of {GRAPH}"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyLlama().write(tmp_path_factory.mktemp("verify") / "tiny.gguf")


@pytest.fixture(scope="module")
def published(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release that nobody touches."""
    folder = tmp_path_factory.mktemp("verify") / "release"
    export(Order(str(gguf), folder, "tiny", Recipe.GGUF_EXACT))
    return folder


@pytest.fixture
def release(published: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(published, tmp_path / "release"))


def manifest_of(release: Path) -> Manifest:
    return decode_manifest((release / MANIFEST_NAME).read_bytes(), "the test's")


def change_manifest(release: Path, change: Callable[[Manifest], Manifest]) -> None:
    (release / MANIFEST_NAME).write_bytes(encode_manifest(change(manifest_of(release))))


def sign_anew(release: Path, name: str) -> None:
    """List a changed file as it is now, so that only what it means can be wrong with it."""
    data = (release / name).read_bytes()

    def change(manifest: Manifest) -> Manifest:
        (old,) = (file for file in manifest.files if file.path == name)
        chunks, done = [], 0
        for size_bytes in [*(chunk.size_bytes for chunk in old.chunks[:-1]), len(data)]:
            piece = data[done : done + size_bytes]
            chunks.append(Chunk(len(piece), hashlib.sha256(piece).hexdigest()))
            done += len(piece)
        listed = ReleaseFile(name, len(data), chunks)
        return msgspec.structs.replace(
            manifest, files=[listed if file.path == name else file for file in manifest.files]
        )

    change_manifest(release, change)


def offset_of(release: Path, name: str) -> int:
    """Where an initialiser begins in the data file."""
    model = onnx.load(release / GRAPH, load_external_data=False)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    return next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")


def has_initialiser(release: Path, name: str) -> bool:
    model = onnx.load(release / GRAPH, load_external_data=False)
    return any(tensor.name == name for tensor in model.graph.initializer)


def broken(report: Report) -> dict[str, str]:
    """What is wrong, by subject; every line of it is one sentence."""
    assert all("\n" not in check.detail for check in report.checks)
    found = {check.subject: check.detail for check in report.checks if check.verdict is Verdict.BROKEN}
    assert report.ok is (not found)
    return found


def subjects(report: Report, verdict: Verdict) -> set[str]:
    return {check.subject for check in report.checks if check.verdict is verdict}


def of(release: Path, checks: Iterator[Check]) -> Report:
    """A report of some checks only: asking transformers takes seconds."""
    return Report(release.name, "some", list(checks))


def of_files(release: Path) -> Report:
    return of(release, check_files(release, manifest_of(release)))


def of_source(release: Path, reference: Path) -> Report:
    return of(release, check_source(release, manifest_of(release), open_checkpoint(str(reference))))


def test_a_release_as_it_was_exported_is_whole(published: Path, gguf: Path) -> None:
    report = verify(published, str(gguf))
    assert broken(report) == {}
    assert subjects(report, Verdict.SKIPPED) == set()
    seen = subjects(report, Verdict.OK)
    assert {DATA, GRAPH, "tokenizer.json", "other files", "source", "embedding", "layers.1.mlp.down"} <= seen
    assert {"head.norm", "rotary.cos", "golden prompt 1", "logits"} <= seen


def test_without_a_reference_it_is_said_what_was_not_looked_at(published: Path) -> None:
    report = verify(published)
    assert broken(report) == {}
    assert subjects(report, Verdict.SKIPPED) == {"source", "logits"}
    assert {DATA, "golden prompt 1"} <= subjects(report, Verdict.OK)


def test_checks_are_told_as_they_are_made(published: Path) -> None:
    told: list[Check] = []
    report = verify(published, seen=told.append)
    assert told == report.checks


def test_programs_get_the_same_as_people(published: Path) -> None:
    report = verify(published)
    read = json.loads(report.to_json())
    assert read["ok"] is True
    assert [check["subject"] for check in read["checks"]] == [check.subject for check in report.checks]
    assert len(report.lines()) == len(report.checks) + 1
    assert report.lines()[-1].endswith(f"{len(report.checks) - 2} ok, 0 broken, 2 skipped.")


def test_a_flipped_bit_is_found_and_the_weight_is_named(release: Path, gguf: Path) -> None:
    path, at = release / DATA, offset_of(release, "layers.1.mlp.down.codes") + 7
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    report = verify(release, str(gguf))
    found = broken(report)
    assert found.keys() == {DATA, "layers.1.mlp.down"}
    start, end = (int(word) for word in found[DATA].split() if word.isdigit())
    assert start <= at < end
    assert found["layers.1.mlp.down"].startswith("1 of 6144 weights are farther from the source")
    assert {"golden prompts", "logits"} <= subjects(report, Verdict.SKIPPED)


def test_a_flipped_bit_that_was_signed_anew_is_found_by_the_reference_alone(release: Path, gguf: Path) -> None:
    path = release / DATA
    data = bytearray(path.read_bytes())
    data[offset_of(release, "head.norm") + 1] ^= 1
    path.write_bytes(data)
    sign_anew(release, DATA)
    assert broken(of_files(release)) == {}
    assert broken(of_source(release, gguf)).keys() == {"head.norm"}


def test_a_file_that_was_cut_off_says_how_much_there_is(release: Path, gguf: Path) -> None:
    size_bytes = (release / DATA).stat().st_size
    os.truncate(release / DATA, size_bytes - 4096)
    found = broken(of_files(release))
    assert found[DATA].startswith(f"has {size_bytes - 4096} bytes, {size_bytes} are listed")


@pytest.mark.parametrize("name", [DATA, GRAPH, "tokenizer.json", "chat_template.jinja", "quality.json"])
def test_a_missing_file_is_named(release: Path, gguf: Path, name: str) -> None:
    (release / name).unlink()
    report = verify(release, str(gguf))
    assert "is missing" in broken(report)[name]
    assert {"golden prompts", "logits"} <= subjects(report, Verdict.SKIPPED)


def test_a_stray_file_is_named(release: Path) -> None:
    (release / "deeper").mkdir()
    (release / "deeper/notes.txt").touch()
    assert broken(of_files(release)) == {
        "other files": "'deeper/notes.txt' in the folder, which the manifest does not list."
    }


def test_two_initialisers_that_were_swapped_are_found(release: Path, gguf: Path) -> None:
    model = onnx.load(release / GRAPH, load_external_data=False)
    first, second = (
        next(tensor for tensor in model.graph.initializer if tensor.name == f"layers.{layer}.mlp_norm")
        for layer in range(2)
    )
    places = list(first.external_data), list(second.external_data)
    for tensor, place in zip((second, first), places, strict=True):
        del tensor.external_data[:]
        tensor.external_data.extend(place)
    (release / GRAPH).write_bytes(model.SerializeToString())
    sign_anew(release, GRAPH)
    found = broken(of_source(release, gguf))
    assert found.keys() == {CONTENT, "layers.0.mlp_norm", "layers.1.mlp_norm"}
    assert "the initializer 'layers.0.mlp_norm' is not as this exporter draws the reference" in found[CONTENT]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("location", "../elsewhere", "leaves the release"),
        ("location", "elsewhere", "elsewhere cannot be read"),
        ("location", "..", "which is no file's name"),
        ("location", ".", "which is no file's name"),
        ("location", "", "which is no file's name"),
        ("location", "/etc/passwd", "which is no file's name or leaves the release"),
        ("location", "model\0", "which is no file's name"),
        ("location", "x" * 300, "cannot be read"),
        ("location", "directory", "directory is not a regular file"),
        ("location", "pipe", "pipe is not a regular file"),
        ("offset", "here", "does not say where 'rotary.cos' lies"),
        ("offset", "9" * 5000, "does not say where 'rotary.cos' lies"),
        ("offset", "-4096", "lies at -4096"),
        ("length", "-1", "in -1 bytes"),
    ],
)
def test_a_graph_that_points_elsewhere_is_not_followed(
    release: Path, gguf: Path, key: str, value: str, words: str
) -> None:
    (release / "directory").mkdir()
    os.mkfifo(release / "pipe")
    model = onnx.load(release / GRAPH, load_external_data=False)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "rotary.cos")
    (entry,) = (entry for entry in tensor.external_data if entry.key == key)
    entry.value = value
    (release / GRAPH).write_bytes(model.SerializeToString())
    with pytest.raises(TargetError, match=words):
        of_source(release, gguf)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("offset", str(2**40), "ends before 'rotary.cos' does"),
        ("offset", str(2**63), "ends before 'rotary.cos' does"),
        ("length", str(2**70), "was expected"),
    ],
)
def test_a_weight_that_would_lie_beyond_its_file_is_named(
    release: Path, gguf: Path, key: str, value: str, words: str
) -> None:
    model = onnx.load(release / GRAPH, load_external_data=False)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "rotary.cos")
    (entry,) = (entry for entry in tensor.external_data if entry.key == key)
    entry.value = value
    (release / GRAPH).write_bytes(model.SerializeToString())
    found = broken(of_source(release, gguf))
    assert found.keys() == {CONTENT, "rotary.cos"}
    assert words in found["rotary.cos"]


@pytest.mark.parametrize("graph", ["tokenizer.json", "chat_template.jinja", "pipe", "no\0file"])
def test_a_graph_that_is_another_file_is_refused(release: Path, gguf: Path, graph: str) -> None:
    os.mkfifo(release / "pipe")
    manifest = msgspec.structs.replace(manifest_of(release), graph=graph)
    with pytest.raises(TargetError, match=r"is not an ONNX graph|is not there"):
        list(check_source(release, manifest, open_checkpoint(str(gguf))))


def test_a_node_that_was_changed_is_named(release: Path, gguf: Path) -> None:
    model = onnx.load(release / GRAPH, load_external_data=False)
    (node,) = (node for node in model.graph.node if node.name == "/layers.0/attention")
    node.attribute[0].i += 1
    (release / GRAPH).write_bytes(model.SerializeToString())
    sign_anew(release, GRAPH)
    assert "the node '/layers.0/attention' is not as" in broken(of_source(release, gguf))[CONTENT]


def test_a_tensor_that_was_changed_in_the_reference_is_found(release: Path, tmp_path: Path) -> None:
    other = TinyLlama()
    other.raw["blk.1.attn_output.weight"][20] ^= 1
    found = broken(of_source(release, other.write(tmp_path / "tiny.gguf")))
    assert found.keys() == {"source", "layers.1.attention.output"}
    assert "name that checkpoint" in found["source"]


def test_another_model_as_reference_is_not_taken_for_this_one(release: Path, tmp_path: Path) -> None:
    other = TinyLlama(layers=1, hidden=128).write(tmp_path / "other.gguf")
    found = broken(of_source(release, other))
    assert {"source", CONTENT} <= found.keys()


def test_a_golden_id_that_was_changed_is_found(release: Path) -> None:
    def change(manifest: Manifest) -> Manifest:
        golden = manifest.golden[1]
        ids = [*golden.ids[:5], (golden.ids[5] + 100) % manifest.tokenizer_size, *golden.ids[6:]]
        changed = msgspec.structs.replace(golden, ids=ids)
        return msgspec.structs.replace(manifest, golden=[manifest.golden[0], changed, *manifest.golden[2:]])

    change_manifest(release, change)
    found = broken(of(release, check_golden(release, manifest_of(release))))
    assert found.keys() == {"golden prompt 2"}
    assert "id 5 is not the best here" in found["golden prompt 2"]


def test_a_tokenizer_that_was_changed_is_found(release: Path, gguf: Path) -> None:
    path = release / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    sign_anew(release, "tokenizer.json")
    found = of_source(release, gguf)
    assert broken(found) == {"content of tokenizer.json": "is not the reference's; export the model again."}


def test_a_variant_that_the_graph_is_not_of_is_found(release: Path, gguf: Path) -> None:
    change_manifest(release, lambda manifest: msgspec.structs.replace(manifest, variant="gguf-parity"))
    with pytest.raises(TargetError, match="The graph is of the variant gguf-exact, the manifest says gguf-parity"):
        of_source(release, gguf)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop_ids", [3]),
        ("bos_id", 7),
        ("device", "cuda"),
        ("family", "qwen2"),
        ("exporter_version", "9"),
        ("quality", None),
        ("operators", ["edgechat.MoeMxfp4"]),
        ("kv", KvShape(9, 9, 9, "float16")),
        ("context_tokens", 2**31),
        ("tokenizer_size", 200),
        ("vocab_size", 10**12),
        ("tokenizer", "chat_template.jinja"),
        ("chat_template", "tokenizer.json"),
        ("source", Source("tiny.gguf", "0" * 64, "llama")),
    ],
)
def test_a_field_of_the_manifest_that_was_changed_is_named(
    release: Path, gguf: Path, field: str, value: object
) -> None:
    change_manifest(release, lambda manifest: msgspec.structs.replace(manifest, golden=[], **{field: value}))
    report = verify(release, str(gguf))
    assert broken(report)[MANIFEST_NAME].startswith(field)
    assert "logits" in subjects(report, Verdict.SKIPPED)


def test_an_architecture_that_was_changed_is_named(release: Path, gguf: Path) -> None:
    def change(manifest: Manifest) -> Manifest:
        source = msgspec.structs.replace(manifest.source, architecture="gpt-oss")
        return msgspec.structs.replace(manifest, source=source)

    change_manifest(release, change)
    found = broken(of_source(release, gguf))
    assert found == {
        MANIFEST_NAME: "source.architecture is 'gpt-oss', 'llama' by the reference and the graph; "
        "export the model again."
    }


def test_a_speech_that_was_changed_is_named(release: Path, gguf: Path) -> None:
    change_manifest(release, lambda manifest: msgspec.structs.replace(manifest, speech="harmony", chat_template=None))
    assert broken(of_source(release, gguf))[MANIFEST_NAME].startswith("speech is 'harmony', 'chat_template'")


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"weights": "every weight is perfect", "chunks": "", "batches": ""}, "what is said of the weights is not"),
        ({}, "what is said of the weights is not"),
    ],
)
def test_a_claim_that_was_changed_is_found(release: Path, gguf: Path, claims: dict[str, str], words: str) -> None:
    change_manifest(release, lambda manifest: msgspec.structs.replace(manifest, claims=claims))
    found = broken(of_source(release, gguf))
    assert found.keys() == {"claims"}
    assert words in found["claims"]


def test_a_claim_that_no_export_makes_is_found(release: Path, gguf: Path) -> None:
    change_manifest(
        release, lambda manifest: msgspec.structs.replace(manifest, claims=manifest.claims | {"speed": "great"})
    )
    assert "are not those of an export" in broken(of_source(release, gguf))["claims"]


def test_a_graph_of_a_variant_that_the_reference_cannot_become_is_refused(gpt_oss: Path, release: Path) -> None:
    with pytest.raises(TargetError, match="The graph is of the variant gguf-exact, not made of this"):
        of_source(release, gpt_oss)


def test_a_manifest_that_the_system_does_not_read_is_one_line(release: Path) -> None:
    (release / MANIFEST_NAME).unlink()
    (release / MANIFEST_NAME).symlink_to("/proc/self/mem")  # a file whose first byte cannot be read
    assert broken(verify(release))[MANIFEST_NAME].startswith("cannot be read (Input/output error)")


def test_a_listed_file_that_the_system_does_not_open_is_named(release: Path) -> None:
    name = "x" * 300
    files = [ReleaseFile(name, 1, [Chunk(1, "0" * 64)])]
    change_manifest(release, lambda manifest: msgspec.structs.replace(manifest, files=[*manifest.files, *files]))
    assert broken(of_files(release))[name].startswith("cannot be read (File name too long)")


def test_a_file_without_permission_to_read_is_named(release: Path) -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as open_to_all:  # unlike pytest's folders, which only their owner may enter
        os.chmod(open_to_all, 0o755)
        copy = shutil.copytree(release, Path(open_to_all) / "release")
        for name in (DATA, "tokenizer.json"):
            (copy / name).chmod(0)
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            found = broken(of_files(copy))
        finally:
            os.seteuid(user)
    assert found.keys() == {DATA, "tokenizer.json"}
    assert all(detail.startswith("cannot be read (Permission denied)") for detail in found.values())


def test_a_manifest_that_cannot_be_read_is_one_line(release: Path) -> None:
    (release / MANIFEST_NAME).write_text("{}")
    report = verify(release)
    assert broken(report).keys() == {MANIFEST_NAME}
    assert len(report.checks) == 1


def test_a_folder_without_a_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"There is no manifest\.json"):
        verify(tmp_path)


def test_a_reference_that_is_not_there_is_refused(release: Path) -> None:
    with pytest.raises(SourceError):
        verify(release, str(release / "nothing.gguf"))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "gpt-oss"
    write_checkpoint(folder, TINY)
    return folder


@pytest.mark.parametrize("dense", Dense)
@pytest.mark.parametrize("recipe", [recipe for recipe in Recipe if not recipe.startswith("gguf")])
def test_every_form_of_experts_keeps_its_promise_on_the_disk(
    gpt_oss: Path, tmp_path: Path, recipe: Recipe, dense: Dense
) -> None:
    release = tmp_path / "release"
    export(Order(str(gpt_oss), release, "tiny", recipe, dense, run=False))
    report = of_source(release, gpt_oss)
    assert broken(report) == {}
    assert {"layers.0.experts.gate_up", "layers.3.experts.down", "source"} <= subjects(report, Verdict.OK)
    damage(release, "layers.3.experts.down")
    assert broken(of_source(release, gpt_oss)).keys() == {"layers.3.experts.down"}


def damage(release: Path, matrix: str) -> None:
    """Flip three bits of a number of its largest array."""
    (name,) = (f"{matrix}.{array}" for array in ("codes", "weight") if has_initialiser(release, f"{matrix}.{array}"))
    at = offset_of(release, name) + 1003  # the high byte of a float
    with (release / DATA).open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x70]))


@pytest.mark.slow
@pytest.mark.parametrize("write_model", [write_llama, write_qwen2])
def test_a_folder_in_float32_agrees_with_transformers(tmp_path: Path, write_model: Callable[[Path], Path]) -> None:
    source, release = write_model(tmp_path / "source"), tmp_path / "release"
    export(Order(str(source), release, "tiny", Recipe.FP32))
    report = verify(release, str(source))
    assert broken(report) == {}
    assert subjects(report, Verdict.SKIPPED) == set()
    (logits,) = (check.detail for check in report.checks if check.subject == "logits")
    assert "top-1 100.00%" in logits
    assert "within 0.0001 of them" in logits
    damage(release, "layers.0.mlp.down")
    sign_anew(release, DATA)
    assert "more than 0.0001 of them" in broken(verify(release, str(source)))["logits"]
