"""Hugging Face folders as checkpoints: the library's values row by row, and a sentence for every kind of damage."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from export.errors import SourceError
from export.forms.values import Mxfp4, Plain
from export.sources.hf_config import read_config, read_spec
from export.sources.safetensors import SafetensorsCheckpoint
from export.spec import Expected, Kind, expected_tensors
from tests.tools.gpt_oss_checkpoint import TINY, write_checkpoint
from tests.tools.hf_checkpoints import Dtype, write_llama, write_qwen2
from tests.tools.safetensors_files import (
    METADATA,
    read_header,
    read_tensor,
    relabel_tensor,
    remove_tensor,
    replace_tensor,
    shard_of,
    stored,
    write_safetensors,
)

SMALL_OSS = replace(TINY, layers=1, shard_bytes=100_000)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def llama_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file."""
    return write_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def oss_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several files and an index."""
    return write_checkpoint(tmp_path_factory.mktemp("oss"), SMALL_OSS)


@pytest.fixture(scope="module")
def opened(oss_files: Path) -> SafetensorsCheckpoint:
    """The one with experts, to be read only."""
    return SafetensorsCheckpoint.open(oss_files)


@pytest.fixture
def llama(llama_files: Path, tmp_path: Path) -> Path:
    """A copy that a test may bend."""
    return Path(shutil.copytree(llama_files, tmp_path / "llama"))


@pytest.fixture
def oss(oss_files: Path, tmp_path: Path) -> Path:
    """A copy that a test may bend."""
    return Path(shutil.copytree(oss_files, tmp_path / "oss"))


def read_floats(checkpoint: SafetensorsCheckpoint, name: str) -> Any:
    """All of a float tensor, as it was shaped."""
    info = checkpoint.tensors[name]
    values = checkpoint.read(name, 0, info.rows)
    assert isinstance(values, Plain)
    return values.weights.reshape(info.shape)


def assert_equal_to_the_library(folder: Path) -> None:
    checkpoint = SafetensorsCheckpoint.open(folder)
    for name in checkpoint.tensors:
        with safe_open(shard_of(folder, name), "pt") as file:
            expected = file.get_tensor(name).float().numpy()
        found = read_floats(checkpoint, name)
        assert (found.dtype, found.shape) == (np.float32, expected.shape)
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32), err_msg=name)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "100KB"])
def test_every_number_is_the_librarys(tmp_path: Path, dtype: Dtype, max_shard_size: str) -> None:
    assert_equal_to_the_library(write_llama(tmp_path, dtype=dtype, max_shard_size=max_shard_size))


def test_biases_and_tied_tables_are_read_like_the_rest(tmp_path: Path) -> None:
    assert_equal_to_the_library(write_qwen2(tmp_path))


@pytest.mark.parametrize(("dtype", "kind"), [(ml_dtypes.bfloat16, Kind.BF16), (np.float16, Kind.F16)])
def test_every_finite_half_becomes_the_very_same_float32(tmp_path: Path, dtype: Any, kind: Kind) -> None:
    folder = write_llama(tmp_path, vocab_size=700, num_hidden_layers=1)
    patterns = np.arange(700 * 96, dtype=np.uint32).astype(np.uint16).reshape(700, 96)
    exponent = 0x7F80 if kind is Kind.BF16 else 0x7C00
    halves = np.where(patterns & exponent == exponent, 0, patterns).astype(np.uint16).view(dtype)
    replace_tensor(folder / WEIGHTS, EMBEDDING, halves)
    checkpoint = SafetensorsCheckpoint.open(folder)
    assert checkpoint.tensors[EMBEDDING].kind is kind
    found = read_floats(checkpoint, EMBEDDING)
    np.testing.assert_array_equal(found.view(np.uint32), halves.astype(np.float32).view(np.uint32))


def test_experts_are_one_tensor_whose_bytes_are_untouched(oss: Path) -> None:
    checkpoint = SafetensorsCheckpoint.open(oss)
    info = checkpoint.tensors[GATE_UP]
    assert (info.kind, info.shape) == (Kind.MXFP4, (6, 320, 96))
    values = checkpoint.read(GATE_UP, 0, info.rows)
    assert isinstance(values, Mxfp4)
    codes, scales = (read_tensor(shard_of(oss, GATE_UP + end), GATE_UP + end) for end in ("_blocks", "_scales"))
    np.testing.assert_array_equal(values.packed, codes.reshape(6 * 320, 3, 16))
    np.testing.assert_array_equal(values.exponents, scales.reshape(6 * 320, 3))
    assert {GATE_UP + "_blocks", GATE_UP + "_scales"}.isdisjoint(checkpoint.tensors)


@settings(deadline=None)
@given(data=st.data())
def test_a_few_rows_are_those_rows_of_the_whole(opened: SafetensorsCheckpoint, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([GATE_UP, GATE_UP + "_bias", EMBEDDING, "model.norm.weight"]))
    rows = opened.tensors[name].rows
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    some, whole = opened.read(name, start, stop), opened.read(name, 0, rows)
    assert len(some) == stop - start
    np.testing.assert_array_equal(some.to_doubles(), whole.to_doubles()[start:stop])


def test_a_vector_has_one_number_a_row(llama: Path) -> None:
    values = SafetensorsCheckpoint.open(llama).read("model.norm.weight", 10, 14)
    assert values.to_doubles().shape == (4, 1)


def test_extents_say_where_the_bytes_lie_codes_before_scales(oss: Path) -> None:
    checkpoint = SafetensorsCheckpoint.open(oss)
    for name in (EMBEDDING, GATE_UP):
        parts = [GATE_UP + "_blocks", GATE_UP + "_scales"] if name == GATE_UP else [name]
        extents = checkpoint.extents(name)
        found = [e.path.read_bytes()[e.offset : e.offset + e.size_bytes] for e in extents]
        assert found == [read_tensor(shard_of(oss, part), part).tobytes() for part in parts]


def test_the_folder_names_the_checkpoint(oss: Path) -> None:
    checkpoint = SafetensorsCheckpoint.open(oss)
    assert (checkpoint.name, checkpoint.architecture) == ("oss", "GptOssForCausalLM")
    assert SafetensorsCheckpoint.open(oss, name="openai/gpt-oss-20b").name == "openai/gpt-oss-20b"


def test_nothing_stays_open(oss: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = SafetensorsCheckpoint.open(oss)
    for name, info in checkpoint.tensors.items():
        checkpoint.read(name, 0, info.rows)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_checkpoint_larger_than_memory_takes_the_memory_of_its_rows(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"vocab_size": 3_000_000, "hidden_size": 4096}
    (llama / "config.json").write_text(json.dumps(config))
    spec = read_spec(read_config(json.dumps(config).encode(), "config.json"), "config.json")
    write_hollow(llama / WEIGHTS, expected_tensors(spec))
    tracemalloc.start()
    checkpoint = SafetensorsCheckpoint.open(llama)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    values = checkpoint.read(EMBEDDING, 2_999_900, 3_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert values.to_doubles().shape == (100, 4096)
    # As stored, as float32, and which of them are finite.
    assert peak - before < (2 + 4 + 1) * 100 * 4096 + 100_000


def write_hollow(path: Path, tensors: dict[str, Expected]) -> None:
    """A file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, expected in tensors.items():
        begin, end = end, end + int(np.prod(expected.shape)) * 2
        header[name] = {"dtype": "BF16", "shape": expected.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


class TestWhatIsThereTwice:
    def test_a_tied_head_that_was_saved_too_is_left_out(self, tmp_path: Path) -> None:
        folder = write_qwen2(tmp_path)
        add_tensor(folder / WEIGHTS, HEAD, read_tensor(folder / WEIGHTS, EMBEDDING))
        checkpoint = SafetensorsCheckpoint.open(folder)
        assert checkpoint.spec.tied_head
        assert HEAD not in checkpoint.tensors

    def test_a_head_of_its_own_that_is_said_to_be_tied_is_refused(self, tmp_path: Path) -> None:
        folder = write_qwen2(tmp_path)
        values = read_tensor(folder / WEIGHTS, EMBEDDING).copy()
        values[-1, -1] += 1
        add_tensor(folder / WEIGHTS, HEAD, values)
        refused(folder, "'lm_head.weight' .* differs from 'model.embed_tokens.weight'.* tie_word_embeddings to false")

    def test_a_head_of_another_type_is_another_head(self, tmp_path: Path) -> None:
        folder = write_qwen2(tmp_path)
        add_tensor(folder / WEIGHTS, HEAD, read_tensor(folder / WEIGHTS, EMBEDDING).astype(np.float32))
        refused(folder, "'lm_head.weight' .* differs")

    def test_frequencies_that_old_versions_saved_are_left_out(self, llama: Path) -> None:
        add_tensor(llama / WEIGHTS, "model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(8, np.float32))
        assert not any("inv_freq" in name for name in SafetensorsCheckpoint.open(llama).tensors)


def add_tensor(path: Path, name: str, values: Any) -> None:
    names = [old for old in read_header(path) if old != METADATA]
    write_safetensors(path, [*(stored(old, read_tensor(path, old)) for old in names), stored(name, values)])


def refused(folder: Path, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        SafetensorsCheckpoint.open(folder)


class TestFilesThatAreNotWhole:
    def test_a_missing_shard_is_named(self, oss: Path) -> None:
        shard_of(oss, EMBEDDING).unlink()
        refused(oss, r"model-0000\d-of-0000\d.safetensors is missing, model.safetensors.index.json names it")

    def test_a_tensor_that_its_shard_does_not_have_is_named(self, oss: Path) -> None:
        remove_tensor(shard_of(oss, "model.norm.weight"), "model.norm.weight")
        refused(oss, r"model-0000\d-of-0000\d.safetensors has no tensor 'model.norm.weight', though .*index.json does")

    def test_a_tensor_that_the_index_does_not_have_is_named(self, oss: Path) -> None:
        bend_json(oss / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
        refused(oss, r"index.json has no tensor 'model.norm.weight', though model-.*.safetensors does")

    def test_a_tensor_that_neither_has_is_named(self, llama: Path) -> None:
        remove_tensor(llama / WEIGHTS, "model.norm.weight")
        refused(llama, "has no tensor 'model.norm.weight'; it is not a whole llama model")

    @pytest.mark.parametrize("layers", [2, 1000])
    def test_another_number_of_layers_than_the_configuration_says_is_named(self, llama: Path, layers: int) -> None:
        bend_json(llama / "config.json", lambda config: config.update(num_hidden_layers=layers, layer_types=None))
        refused(llama, f"is 1 by its tensors and {layers} by its configuration; .*num_hidden_layers in config")

    def test_a_tensor_that_no_graph_knows_is_named(self, llama: Path) -> None:
        add_tensor(llama / WEIGHTS, "model.layers.0.self_attn.q_norm.weight", np.ones(16, np.float32))
        refused(llama, "'model.layers.0.self_attn.q_norm.weight'")

    def test_a_shard_that_is_cut_short_is_named(self, oss: Path) -> None:
        shard = shard_of(oss, EMBEDDING)
        os.truncate(shard, shard.stat().st_size - 1)
        refused(oss, rf"{shard.name} is cut short: the tensor '.*' should end")

    def test_a_shard_that_is_cut_after_it_was_opened_is_noticed(self, oss: Path) -> None:
        checkpoint = SafetensorsCheckpoint.open(oss)
        shard = shard_of(oss, EMBEDDING)
        os.truncate(shard, shard.stat().st_size - 1)
        with pytest.raises(SourceError, match=rf"{shard.name} changed while it was being read"):
            checkpoint.read(EMBEDDING, 0, 1)

    def test_a_read_that_comes_to_the_files_end_is_noticed(self, oss: Path) -> None:
        # What a file system does that reports an old size: here the tensor lies further on than the file goes.
        checkpoint = SafetensorsCheckpoint.open(oss)
        further = further_on(checkpoint.sources[EMBEDDING], shard_of(oss, EMBEDDING).stat().st_size)
        with pytest.raises(SourceError, match=rf"safetensors ends inside the tensor '{EMBEDDING}'"):
            replace(checkpoint, sources={EMBEDDING: further}).read(EMBEDDING, 0, 1)

    def test_a_shard_that_vanishes_after_it_was_opened_is_named(self, oss: Path) -> None:
        checkpoint = SafetensorsCheckpoint.open(oss)
        shard_of(oss, EMBEDDING).unlink()
        with pytest.raises(SourceError, match=r"There is no file .*\.safetensors"):
            checkpoint.read(EMBEDDING, 0, 1)

    @pytest.mark.parametrize(
        "name",
        ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\0.safetensors", "x.bin", ".safetensors"],
    )
    def test_an_index_names_only_files_beside_it(self, oss: Path, name: str) -> None:
        bend_json(oss / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
        refused(oss, "index.json names the file '.*', which is no name of a safetensors file beside it")

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"weight_map": {"x": 3}}', b"\xff", b"[" * 9999])
    def test_an_index_that_is_none_is_named(self, oss: Path, text: bytes) -> None:
        (oss / INDEX).write_bytes(text)
        refused(oss, "index.json cannot be read")

    def test_a_folder_without_weights_is_refused(self, llama: Path) -> None:
        (llama / WEIGHTS).unlink()
        refused(llama, "has neither model.safetensors nor model.safetensors.index.json")

    def test_a_folder_without_a_config_is_refused(self, llama: Path) -> None:
        (llama / "config.json").unlink()
        refused(llama, "There is no file .*config.json")

    def test_a_pipe_in_the_place_of_a_file_does_not_hold_us_up(self, llama: Path) -> None:
        (llama / WEIGHTS).unlink()
        os.mkfifo(llama / WEIGHTS)
        refused(llama, "There is no file .*model.safetensors")

    def test_a_config_of_any_length_is_not_swallowed(self, llama: Path) -> None:
        os.truncate(llama / "config.json", 1 << 40)
        refused(llama, "config.json has 1099511627776 bytes, more than")

    def test_links_are_followed_as_the_hubs_cache_has_them(self, llama: Path, tmp_path: Path) -> None:
        linked = tmp_path / "snapshot"
        linked.mkdir()
        for path in llama.iterdir():
            (linked / path.name).symlink_to(path)
        assert SafetensorsCheckpoint.open(linked).tensors == SafetensorsCheckpoint.open(llama).tensors


def further_on(source: Any, offset: int) -> Any:
    """The same tensor, but `offset` bytes further on than it is."""
    tensor = replace(source.stored.tensor, offset=source.stored.tensor.offset + offset)
    return replace(source, stored=replace(source.stored, tensor=tensor))


def bend_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


class TestTensorsOfTheWrongKind:
    def test_another_shape_is_refused(self, llama: Path) -> None:
        replace_tensor(llama / WEIGHTS, "model.norm.weight", np.ones(97, np.float32))
        refused(llama, r"'model.norm.weight' .* is \(97,\), its configuration says \(96,\)")

    def test_another_type_is_refused(self, llama: Path) -> None:
        replace_tensor(llama / WEIGHTS, "model.norm.weight", np.ones(96, np.float64))
        refused(
            llama, r"'model.norm.weight' of .*model.safetensors is stored as F64; this exporter reads F32, F16, BF16"
        )

    def test_eight_bit_floats_are_refused(self, llama: Path) -> None:
        replace_tensor(llama / WEIGHTS, "model.norm.weight", np.ones(96, np.uint8))
        relabel_tensor(llama / WEIGHTS, "model.norm.weight", dtype="F8_E4M3")
        refused(llama, "'model.norm.weight' .* is stored as F8_E4M3")

    @pytest.mark.parametrize("end", ["_blocks", "_scales"])
    def test_half_of_the_experts_is_refused(self, oss: Path, end: str) -> None:
        remove_tensor(shard_of(oss, GATE_UP + end), GATE_UP + end)
        bend_json(oss / INDEX, lambda index: index["weight_map"].pop(GATE_UP + end))
        refused(oss, rf"there is no '{GATE_UP}{end}'")

    @pytest.mark.parametrize("end", ["_blocks", "_scales"])
    def test_experts_of_another_type_are_refused(self, oss: Path, end: str) -> None:
        shard = shard_of(oss, GATE_UP + end)
        relabel_tensor(shard, GATE_UP + end, dtype="I8")
        refused(oss, rf"'{GATE_UP}{end}' of .* is stored as I8, not U8")

    @pytest.mark.parametrize(
        ("end", "shape"),
        [
            ("_blocks", (6, 320, 48)),
            ("_blocks", (6, 320, 6, 8)),
            ("_blocks", (320, 6, 3, 16)),
            ("_blocks", (6, 320, 1, 3, 16)),
            ("_scales", (6, 960)),
            ("_scales", (6, 320, 3, 1)),
            ("_scales", (6, 3, 320)),
        ],
    )
    def test_experts_of_another_shape_are_refused(self, oss: Path, end: str, shape: tuple[int, ...]) -> None:
        relabel_tensor(shard_of(oss, GATE_UP + end), GATE_UP + end, shape=shape)
        refused(oss, rf"'{GATE_UP}_blocks' of .* is \(.*\) and its scales are \(.*\); MXFP4 is")

    @pytest.mark.parametrize("name", ["x_blocks", "x_scales_blocks", "_scales", "model.layers.0.mlp.router_blocks"])
    def test_a_name_that_only_looks_like_experts_is_refused(self, oss: Path, name: str) -> None:
        shard = shard_of(oss, EMBEDDING)
        add_tensor(shard, name, np.ones((1, 1, 1, 16), np.uint8))
        bend_json(oss / INDEX, lambda index: index["weight_map"].update({name: shard.name}))
        refused(oss, "has .* but there is no")

    def test_a_dequantised_copy_is_told_where_the_original_is(self, oss: Path) -> None:
        shard = shard_of(oss, GATE_UP + "_bias")
        add_tensor(shard, GATE_UP, np.ones((6, 96, 320), ml_dtypes.bfloat16))
        bend_json(oss / INDEX, lambda index: index["weight_map"].update({GATE_UP: shard.name}))
        refused(oss, rf"'{GATE_UP}' of .* are stored as BF16: a dequantised copy.*openai/gpt-oss-20b")


class TestNumbersThatAreNone:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
    def test_the_first_bad_row_is_named(self, llama: Path, bad: float, dtype: Any) -> None:
        values = read_tensor(llama / WEIGHTS, EMBEDDING).astype(dtype)
        values[17, 3] = values[40, 0] = bad
        replace_tensor(llama / WEIGHTS, EMBEDDING, values)
        checkpoint = SafetensorsCheckpoint.open(llama)
        assert len(checkpoint.read(EMBEDDING, 0, 17)) == 17
        with pytest.raises(SourceError, match=rf"'{EMBEDDING}' of .*model.safetensors has .* not finite in row 17"):
            checkpoint.read(EMBEDDING, 10, 50)

    def test_a_bad_number_of_a_vector_is_named(self, llama: Path) -> None:
        values = np.ones(96, np.float32)
        values[95] = np.nan
        replace_tensor(llama / WEIGHTS, "model.norm.weight", values)
        with pytest.raises(SourceError, match=r"'model.norm.weight' .* in row 95"):
            SafetensorsCheckpoint.open(llama).read("model.norm.weight", 0, 96)

    def test_an_exponent_that_stands_for_no_number_is_named(self, oss: Path) -> None:
        name = GATE_UP + "_scales"
        exponents = read_tensor(shard_of(oss, name), name).copy()
        exponents[2, 5, 1] = 255
        replace_tensor(shard_of(oss, name), name, exponents)
        checkpoint = SafetensorsCheckpoint.open(oss)
        assert len(checkpoint.read(GATE_UP, 0, 640)) == 640
        with pytest.raises(SourceError, match=rf"'{name}' of .* has the exponent 255, which is no number, in row 645"):
            checkpoint.read(GATE_UP, 640, 960)


FUZZED = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX, "first", "last"]


def fuzzed(folder: Path, file: str) -> Path:
    shards = sorted(folder.glob("*.safetensors"))
    return {"first": shards[0], "last": shards[-1]}.get(file, folder / file)


def opened_and_read(folder: Path) -> dict[str, Any] | None:
    """Everything a checkpoint says, None if it was refused."""
    try:
        checkpoint = SafetensorsCheckpoint.open(folder)
        return {name: checkpoint.read(name, 0, info.rows).to_doubles() for name, info in checkpoint.tensors.items()}
    except SourceError as refusal:
        assert len(refusal.message.encode()) < 2000
        return None


@pytest.fixture(scope="module")
def fuzz_folder(oss_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(oss_files, tmp_path_factory.mktemp("fuzz") / "oss"))


@FUZZED
@given(file=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True))
def test_a_file_that_ends_anywhere_is_refused_or_does_not_matter(
    oss_files: Path, fuzz_folder: Path, file: str, where: float
) -> None:
    path = fuzzed(fuzz_folder, file)
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: int(where * len(whole))])
        found = opened_and_read(fuzz_folder)
    finally:
        path.write_bytes(whole)
    # A newline at the end may be missing.
    assert found is None or int(where * len(whole)) >= len(whole.rstrip())


@FUZZED
@given(
    file=st.sampled_from(FILES),
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_flipped_bytes_give_a_refusal_or_a_checkpoint(
    fuzz_folder: Path, file: str, flips: list[tuple[int, int]]
) -> None:
    path = fuzzed(fuzz_folder, file)
    whole = path.read_bytes()
    bent = bytearray(whole)
    for place, value in flips:
        bent[place % len(bent)] = value
    tracemalloc.start()
    try:
        path.write_bytes(bent)
        opened_and_read(fuzz_folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        path.write_bytes(whole)
    assert peak < 64 << 20
