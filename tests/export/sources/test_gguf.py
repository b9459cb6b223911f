from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import SourceError
from export.forms.values import Blocks, Doubles, Plain
from export.sources.checkpoint import Checkpoint, Extent
from export.sources.gguf import GgufCheckpoint
from export.sources.gguf_spec import hugging_face_name
from export.spec import Kind
from tests.export import ggml_bytes
from tests.export.tiny_gguf import TOKENS, TinyLlama, tiny_q4_k_m, tiny_qwen2

LAYER = "model.layers.0.self_attn."
EVERY_KIND = {
    "attn_q": Kind.Q4_K,
    "attn_k": Kind.BF16,
    "attn_v": Kind.F16,
    "attn_output": Kind.F32,
    "ffn_gate": Kind.Q4_0,
    "ffn_up": Kind.Q4_1,
    "ffn_down": Kind.Q8_0,
    "output": Kind.Q6_K,
    "blk.1.attn_q.weight": Kind.Q6_K,
    "blk.1.attn_k.weight": Kind.Q8_0,
}


def every_kind() -> TinyLlama:
    return TinyLlama(hidden=256, intermediate=64, tied_head=False, kinds=EVERY_KIND)


@pytest.fixture(scope="module")
def every_kind_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_kind().write(tmp_path_factory.mktemp("gguf") / "every-kind.gguf")


def opened(model: TinyLlama, folder: Path) -> GgufCheckpoint:
    return GgufCheckpoint.open(model.write(folder / "tiny.gguf"))


def refusal(path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        read_all(GgufCheckpoint.open(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


def read_all(checkpoint: Checkpoint) -> dict[str, Doubles]:
    return {name: whole(checkpoint, name) for name in checkpoint.tensors}


def whole(checkpoint: Checkpoint, name: str) -> Doubles:
    return checkpoint.read(name, 0, checkpoint.tensors[name].rows).to_doubles()


def in_hugging_faces_order(weights: Doubles, heads: int) -> Doubles:
    """q and k as they were before llama.cpp, which put rows i and i + size / 2 of a head at 2i and 2i + 1."""
    size = len(weights) // heads
    order = [head * size + 2 * i + half for head in range(heads) for half in range(2) for i in range(size // 2)]
    return weights[order]


def test_every_tensor_is_what_the_library_reads_in_hugging_faces_order(every_kind_file: Path) -> None:
    model, checkpoint = every_kind(), GgufCheckpoint.open(every_kind_file)
    heads = {"attn_q": 4, "attn_k": 2}
    for name, shape in model.shapes.items():
        weights = model.weights(name)
        part = name.split(".")[-2]
        if part in heads:
            weights = in_hugging_faces_order(weights, heads[part])
        info = checkpoint.tensors[hugging_face_name(name)]
        assert (info.shape, info.kind) == (shape, model.kind(name))
        found = whole(checkpoint, info.name).astype(np.float32)
        assert found.shape == (info.rows, info.columns if len(shape) > 1 else 1)
        assert np.array_equal(found.reshape(shape), weights), name
    assert {info.kind for info in checkpoint.tensors.values()} == set(Kind) - {Kind.MXFP4}


def test_floats_are_plain_and_blocks_keep_their_codes(every_kind_file: Path) -> None:
    checkpoint = GgufCheckpoint.open(every_kind_file)
    for name, info in checkpoint.tensors.items():
        assert isinstance(checkpoint.read(name, 0, 2), Plain if info.kind.is_float else Blocks)


@given(data=st.data())
def test_any_rows_are_those_rows_of_the_whole(every_kind_file: Path, data: st.DataObject) -> None:
    checkpoint = GgufCheckpoint.open(every_kind_file)
    name = data.draw(st.sampled_from(sorted(checkpoint.tensors)))
    stop = data.draw(st.integers(1, checkpoint.tensors[name].rows))
    start = data.draw(st.integers(0, stop - 1))
    assert np.array_equal(checkpoint.read(name, start, stop).to_doubles(), whole(checkpoint, name)[start:stop])


def test_extents_are_the_bytes_that_were_written(every_kind_file: Path) -> None:
    model, checkpoint = every_kind(), GgufCheckpoint.open(every_kind_file)
    data = every_kind_file.read_bytes()
    for name, raw in model.raw.items():
        (extent,) = checkpoint.extents(hugging_face_name(name))
        assert extent == Extent(every_kind_file, extent.offset, raw.nbytes)
        assert data[extent.offset :][: extent.size_bytes] == raw.tobytes()


def test_a_checkpoint_is_called_what_its_file_is_called(tmp_path: Path) -> None:
    checkpoint = opened(TinyLlama(), tmp_path)
    assert (checkpoint.name, checkpoint.architecture) == ("tiny.gguf", "llama")
    assert opened(tiny_qwen2(), tmp_path).architecture == "qwen2"


def test_the_biases_of_a_llama_are_in_hugging_faces_order_too(tmp_path: Path) -> None:
    model = TinyLlama(qkv_bias=True)
    checkpoint = opened(model, tmp_path)
    assert checkpoint.spec == model.spec
    expected = in_hugging_faces_order(model.weights("blk.0.attn_q.bias"), 4)
    assert np.array_equal(whole(checkpoint, LAYER + "q_proj.bias")[:, 0], expected)
    values = model.weights("blk.0.attn_v.bias")
    assert np.array_equal(whole(checkpoint, LAYER + "v_proj.bias")[:, 0], values)


def test_rows_of_a_qwen2_are_as_they_lie(tmp_path: Path) -> None:
    model = tiny_qwen2()
    checkpoint = opened(model, tmp_path)
    assert checkpoint.spec == model.spec
    assert np.array_equal(whole(checkpoint, LAYER + "q_proj.weight"), model.weights("blk.0.attn_q.weight"))
    assert np.array_equal(whole(checkpoint, LAYER + "k_proj.bias")[:, 0], model.weights("blk.0.attn_k.bias"))


def test_divisors_of_the_rotary_frequencies_are_in_the_spec_and_no_tensor(tmp_path: Path) -> None:
    model = TinyLlama(rope_divisors=(1.0, 1.0, 1.0, 1.5, 2.5, 4.0, 8.0, 8.0))
    checkpoint = opened(model, tmp_path)
    assert checkpoint.spec == model.spec
    assert not [name for name in checkpoint.tensors if "rope" in name]


@pytest.mark.parametrize(("kind", "shape"), [(Kind.Q8_0, (32,)), (Kind.F32, (2, 4))])
def test_divisors_of_another_form_are_refused(tmp_path: Path, kind: Kind, shape: tuple[int, ...]) -> None:
    model = TinyLlama(kinds={"rope_freqs.weight": kind})
    model.shapes["rope_freqs.weight"] = shape
    model.raw["rope_freqs.weight"] = ggml_bytes.random_rows(np.random.default_rng(1), kind, shape)
    assert "'rope_freqs.weight'" in refusal(model.write(tmp_path / "x.gguf"))


def test_a_file_of_mixed_k_quants_is_read_as_it_is(tmp_path: Path) -> None:
    checkpoint = opened(tiny_q4_k_m(), tmp_path)
    kinds = [checkpoint.tensors[f"{LAYER}{part}_proj.weight"].kind for part in "qkv"]
    assert kinds == [Kind.Q4_K, Kind.Q4_K, Kind.Q6_K]


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.MXFP4])
def test_numbers_that_are_not_finite_are_refused_by_the_tensors_name(tmp_path: Path, kind: Kind) -> None:
    model = TinyLlama(hidden=256, layers=1, kinds={"attn_output": kind})
    raw = model.raw["blk.0.attn_output.weight"]
    place = {Kind.Q6_K: 208, Kind.F32: 2, Kind.BF16: 0}.get(kind, 0)
    raw[1, place : place + 2] = [0x80, 0x7F] if kind in (Kind.F32, Kind.BF16) else [0, 0x7C]
    checkpoint = opened(model, tmp_path)
    name = LAYER + "o_proj.weight"
    with pytest.raises(SourceError, match=r"'blk.0.attn_output.weight' of .*tiny.gguf has numbers that are not finite"):
        checkpoint.read(name, 0, 256)
    assert len(checkpoint.read(name, 0, 1)) == 1


def test_a_tensor_of_another_size_is_named(tmp_path: Path) -> None:
    model = TinyLlama()
    model.raw["blk.1.ffn_up.weight"] = model.raw["blk.1.ffn_up.weight"][:-1]
    assert "'blk.1.ffn_up.weight'" in refusal(model.write(tmp_path / "x.gguf"))


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight"])
def test_a_tensor_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    model = TinyLlama()
    del model.raw[name]
    assert f"has no tensor {name!r}" in refusal(model.write(tmp_path / "x.gguf"))


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "blk.0.ffn_up.bias", "rope_factors_long.weight"])
def test_a_tensor_that_the_graph_would_leave_out_is_named(tmp_path: Path, name: str) -> None:
    model = TinyLlama()
    model.raw[name], model.shapes[name] = np.zeros(64, np.uint8), (16,)
    assert f"(first: {name!r})" in refusal(model.write(tmp_path / "x.gguf"))


def test_a_quantised_norm_is_refused(tmp_path: Path) -> None:
    model = TinyLlama(kinds={"output_norm.weight": Kind.Q8_0})
    assert "a float type was expected" in refusal(model.write(tmp_path / "x.gguf"))


def test_more_tokens_than_rows_of_the_embedding_are_refused(tmp_path: Path) -> None:
    model = TinyLlama()
    model.raw["token_embd.weight"] = model.raw["token_embd.weight"][:-1]
    assert f"{len(TOKENS)} tokens and an embedding of {len(TOKENS) - 1}" in refusal(model.write(tmp_path / "x.gguf"))


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    assert "There is no file" in refusal(tmp_path / "none.gguf")
    assert "cannot be read" in refusal(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    checkpoint = opened(TinyLlama(), tmp_path)
    with checkpoint.path.open("r+b") as file:
        file.truncate(checkpoint.path.stat().st_size // 2)
    with pytest.raises(SourceError, match=r"ends in the middle of the tensor 'blk"):
        read_all(checkpoint)
    checkpoint.path.unlink()
    with pytest.raises(SourceError, match="cannot be read any more"):
        read_all(checkpoint)


SMALL = TinyLlama(layers=1, rope_divisors=(1.0,) * 8)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SMALL.write(tmp_path_factory.mktemp("gguf") / "small.gguf")


@settings(deadline=None)  # files are written, which on a busy machine takes as long as it takes
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_anywhere_is_refused(small: Path, share: float) -> None:
    path = small.with_name("cut.gguf")
    data = small.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refusal(path)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_flipped_bits_in_the_header_are_refused_or_harmless(small: Path, data: st.DataObject) -> None:
    damaged = bytearray(small.read_bytes())
    header_bytes = len(damaged) - sum(-(-raw.nbytes // 32) * 32 for raw in SMALL.raw.values())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, header_bytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = small.with_name("flipped.gguf")
    path.write_bytes(damaged)
    try:
        numbers = read_all(GgufCheckpoint.open(path))
    except SourceError as error:
        assert str(path) in str(error)
        return
    assert sum(map(np.size, numbers.values())) < 10 * len(damaged)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", [TinyLlama(hidden=256, tied_head=False), tiny_qwen2(), tiny_q4_k_m()])
def test_transformers_finds_the_same_tensors(tmp_path: Path, model: TinyLlama) -> None:
    from transformers import AutoModelForCausalLM

    path = model.write(tmp_path / "tiny.gguf")
    theirs: dict[str, Any] = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    checkpoint = GgufCheckpoint.open(path)
    for name, info in checkpoint.tensors.items():
        found = whole(checkpoint, name).astype(np.float32).reshape(info.shape)
        assert np.array_equal(found, theirs[name].numpy()), name
    assert not theirs.keys() - checkpoint.tensors.keys() - {"lm_head.weight"}
