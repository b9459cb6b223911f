from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.tools.gpt_oss_checkpoint import (
    FULL,
    PIECE,
    TINY,
    Codes,
    Exponents,
    Normal,
    Planned,
    main,
    model_config,
    planned_tensors,
    shards,
    stored_tensor,
    write_checkpoint,
)
from tests.tools.gpt_oss_tokenizer import CHAT_TEMPLATE, SPECIAL_TEXTS, write_genuine
from tests.tools.hf_checkpoints import Doubles, load_reference, reference_logits, reference_step_by_step
from tests.tools.safetensors_files import Array, read_header, read_tensor, shard_of, write_safetensors

IDS = [(37 * index) % TINY.vocab for index in range(3 * TINY.window)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("gpt-oss"), TINY)


def tensor(folder: Path, name: str) -> Array:
    return read_tensor(shard_of(folder, name), name)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_full_shape_has_the_real_models_bytes_and_shards() -> None:
    tensors = planned_tensors(FULL)
    # total_size in the real model.safetensors.index.json.
    assert sum(tensor.nbytes for tensor in tensors) == 13_761_264_768
    assert len(tensors) == 459
    assert [round(sum(tensor.nbytes for tensor in part) / 1e9, 1) for part in shards(tensors, FULL.shard_bytes)] == [
        4.8,
        4.8,
        4.2,
    ]


def test_the_full_shape_has_the_real_models_special_ids() -> None:
    ids = {text: FULL.id_of(text) for text in ("<|return|>", "<|channel|>", "<|start|>", "<|message|>", "<|call|>")}
    assert ids == {
        "<|return|>": 200_002,
        "<|channel|>": 200_005,
        "<|start|>": 200_006,
        "<|message|>": 200_008,
        "<|call|>": 200_012,
    }


def test_a_layer_has_the_real_models_names_and_shapes() -> None:
    shapes = {planned.name: planned.shape for planned in planned_tensors(FULL)}
    experts = "model.layers.23.mlp.experts."
    assert shapes[experts + "gate_up_proj_blocks"] == (32, 5760, 90, 16)
    assert shapes[experts + "gate_up_proj_scales"] == (32, 5760, 90)
    assert shapes[experts + "gate_up_proj_bias"] == (32, 5760)
    assert shapes[experts + "down_proj_blocks"] == (32, 2880, 90, 16)
    assert shapes[experts + "down_proj_scales"] == (32, 2880, 90)
    assert shapes["model.layers.23.self_attn.sinks"] == (64,)
    assert shapes["model.layers.23.self_attn.k_proj.weight"] == (512, 2880)
    assert shapes["lm_head.weight"] == (201_088, 2880)


def test_the_library_finds_every_tensor_where_the_index_says(tiny: Path) -> None:
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    found: dict[str, tuple[str, Array]] = {}
    for path in sorted(tiny.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as reader:
            found |= {name: (path.name, reader.get_tensor(name)) for name in reader.keys()}  # noqa: SIM118
    assert {name: file for name, (file, _) in found.items()} == index["weight_map"]
    assert sum(values.nbytes for _, values in found.values()) == index["metadata"]["total_size"]
    planned = {planned.name: planned for planned in planned_tensors(TINY)}
    assert {name: values.shape for name, (_, values) in found.items()} == {n: p.shape for n, p in planned.items()}
    for name, (_, values) in found.items():
        is_raw = name.endswith(("_blocks", "_scales"))
        assert values.dtype == (np.uint8 if is_raw else ml_dtypes.bfloat16), name
        assert values.tobytes() == tensor(tiny, name).tobytes(), name


def test_a_layer_is_cut_between_two_shards(tiny: Path) -> None:
    weight_map = json.loads((tiny / "model.safetensors.index.json").read_text())["weight_map"]
    files = [
        {file for name, file in weight_map.items() if name.startswith(f"model.layers.{layer}.")} for layer in range(4)
    ]
    assert any(len(shared) > 1 for shared in files)


def dequantised(blocks: Array, scales: Array) -> Doubles:
    """[experts, rows, columns] from the format's text: low nibble first, sign in bit 3, scale 2 ** (byte - 127)."""
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    values = np.where(codes & 8, -1.0, 1.0) * magnitudes[codes & 7]
    result: Doubles = (values * 2.0 ** (scales.astype(np.float64) - 127)[..., None]).reshape(*blocks.shape[:2], -1)
    return result


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_transformers_reads_the_expert_values_that_the_format_defines(tiny: Path, name: str) -> None:
    key = f"model.layers.1.mlp.experts.{name}"
    expected = dequantised(tensor(tiny, key + "_blocks"), tensor(tiny, key + "_scales"))
    found = getattr(load_reference(tiny).model.layers[1].mlp.experts, name)
    assert str(found.dtype) == "torch.float32"
    np.testing.assert_array_equal(found.detach().numpy(), expected.swapaxes(1, 2))


def test_every_token_counts_and_no_logit_stands_out(tiny: Path) -> None:
    logits = reference_logits(tiny, IDS)
    assert logits.shape == (len(IDS), TINY.vocab)
    assert 0.5 < logits.std() < 2
    assert np.abs(logits).max() < 10
    assert len(set(logits.argmax(-1).tolist())) > len(IDS) // 2


def test_step_by_step_across_the_windows_edge_says_the_same_as_at_once(tiny: Path) -> None:
    at_once = reference_logits(tiny, IDS)
    np.testing.assert_allclose(reference_step_by_step(tiny, IDS), at_once, rtol=0, atol=2e-5)
    halves = [len(IDS) // 2, len(IDS) - len(IDS) // 2]
    np.testing.assert_allclose(reference_step_by_step(tiny, IDS, halves), at_once, rtol=0, atol=2e-5)


def test_the_tiny_window_is_felt(tiny: Path, tmp_path: Path) -> None:
    wide = write_checkpoint(tmp_path, replace(TINY, window=128))
    difference = np.abs(reference_logits(wide, IDS) - reference_logits(tiny, IDS)).max(-1)
    assert difference[: TINY.window].max() < 1e-5
    assert difference[TINY.window :].min() > 1e-3


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny: Path, tmp_path: Path) -> None:
    again = write_checkpoint(tmp_path / "again", TINY)
    assert files_of(again) == files_of(tiny)
    other = write_checkpoint(tmp_path / "other", replace(TINY, seed=1))
    assert tensor(other, "lm_head.weight").tobytes() != tensor(tiny, "lm_head.weight").tobytes()


def test_no_two_tensors_have_the_same_values(tiny: Path) -> None:
    names = [planned.name for planned in planned_tensors(TINY)]
    assert len({tensor(tiny, name).tobytes() for name in names}) == len(names)


def test_values_do_not_depend_on_how_many_layers_there_are(tiny: Path, tmp_path: Path) -> None:
    short = write_checkpoint(tmp_path, replace(TINY, layers=2))
    for name in read_header(shard_of(short, "lm_head.weight")):
        if name != "__metadata__":
            assert tensor(short, name).tobytes() == tensor(tiny, name).tobytes(), name


@pytest.mark.parametrize("values", [Normal(1, 0.1), Codes(), Exponents(120)])
def test_a_large_tensor_is_never_whole_in_memory(values: Normal | Codes | Exponents, tmp_path: Path) -> None:
    planned = Planned("x", (9, PIECE), values)
    tracemalloc.start()
    write_safetensors(tmp_path / "x", [stored_tensor(planned, seed=0)])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "x").stat().st_size > planned.nbytes
    assert peak_bytes < 40e6


@pytest.mark.parametrize("values", [Normal(0, 1), Codes(), Exponents(120)])
def test_the_length_of_a_piece_does_not_show(values: Normal | Codes | Exponents) -> None:
    longer, shorter = (
        np.concatenate(list(stored_tensor(Planned("x", (count,), values), seed=0).pieces()))
        for count in (PIECE + 24, PIECE - 24)
    )
    assert longer.dtype == (ml_dtypes.bfloat16 if isinstance(values, Normal) else np.uint8)
    np.testing.assert_array_equal(longer[: PIECE - 24], shorter)


def test_scales_surround_the_size_that_keeps_a_layer_finite(tiny: Path) -> None:
    scales = tensor(tiny, "model.layers.0.mlp.experts.gate_up_proj_scales")
    blocks = tensor(tiny, "model.layers.0.mlp.experts.gate_up_proj_blocks")
    assert len(np.unique(scales)) == 3
    assert dequantised(blocks, scales).std() == pytest.approx(1 / np.sqrt(TINY.hidden), rel=0.45)


def test_the_tiny_tokenizer_puts_harmonys_tokens_where_the_configuration_says(tiny: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert [tokenizer.token_to_id(text) for text in SPECIAL_TEXTS] == [TINY.id_of(text) for text in SPECIAL_TEXTS]
    assert tokenizer.get_vocab_size() < TINY.vocab
    ids = tokenizer.encode("<|start|>user<|message|>hell 春<|end|>").ids
    assert [ids[0], ids[-1]] == [TINY.id_of("<|start|>"), TINY.id_of("<|end|>")]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|start|>user<|message|>hell 春<|end|>"
    assert model_config(TINY)["eos_token_id"] == TINY.id_of("<|return|>")


def test_the_chat_template_speaks_harmonys_roles(tiny: Path) -> None:
    messages = [{"role": "user", "content": "hell"}, {"role": "assistant", "content": "no"}]
    text = AutoTokenizer.from_pretrained(tiny).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|start|>user<|message|>hell<|end|><|start|>assistant<|channel|>final<|message|>no<|end|><|start|>assistant"
    )


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 261 ids below the special ones, not 260"):
        write_checkpoint(tmp_path, replace(TINY, vocab=292))


def test_the_command_line_bends_the_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "x"), "--tiny", "--layers", "1", "--vocab", "777", "--tokenizer", "none"]) == 0
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"]) == (1, 777)
    assert not (tmp_path / "x" / "tokenizer.json").exists()
    assert "0.00 GB of tensors" in capsys.readouterr().out


def test_the_genuine_tokenizer_is_copied_with_a_template_beside_it(tmp_path: Path) -> None:
    genuine = tmp_path / "genuine.json"
    genuine.write_text("{}")
    write_genuine(tmp_path, genuine, FULL.first_special)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_the_genuine_tokenizer_fits_no_small_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="special ids begin at 199998, not 299"):
        write_checkpoint(tmp_path, TINY, tokenizer="gpt-oss")


def test_a_genuine_tokenizer_that_was_not_fetched_is_missed_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run scripts/get-tokenizer"):
        write_checkpoint(tmp_path, FULL, tokenizer="gpt-oss", genuine_tokenizer=tmp_path / "nowhere.json")
    assert list(tmp_path.iterdir()) == []
