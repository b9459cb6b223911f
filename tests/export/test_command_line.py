"""The command as a person meets it: sentences, exit codes, and nothing lost whatever happens."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from core.manifest import MANIFEST_NAME, decode_manifest
from export.__main__ import main
from export.quantize import BlockFormat
from export.writer import matches
from tests.export.tiny_gguf import TinyLlama

ROOT = Path(__file__).resolve().parents[2]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, which must refuse with exit code 1; returns its one line."""
    assert main([str(argument) for argument in arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("export: ")
    return lines[0]


def is_whole(release: Path) -> bool:
    manifest = decode_manifest((release / MANIFEST_NAME).read_bytes(), str(release))
    return all(matches(release, file) for file in manifest.files)


def test_one_command_exports_and_says_what_it_did(
    tmp_path: Path, tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_gguf), "--out", str(tmp_path / "tiny-llama")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("tiny-llama@")
    assert is_whole(tmp_path / "tiny-llama")
    assert main(arguments) == 0
    assert "was there already" in capsys.readouterr().out


def test_the_model_can_have_another_name_than_its_folder(tmp_path: Path, tiny_gguf: Path) -> None:
    assert main([str(tiny_gguf), "--out", str(tmp_path / "v1"), "--model", "tiny", "--recipe", "gguf-parity"]) == 0
    manifest = decode_manifest((tmp_path / "v1" / MANIFEST_NAME).read_bytes(), "v1")
    assert (manifest.model, manifest.variant) == ("tiny", "gguf-parity")


def test_help_teaches_recipes_and_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert "python -m export .cache/models/" in text
    assert "gguf-exact   for serving" in text
    assert "gguf-parity  the oracle" in text


@pytest.mark.parametrize("arguments", [[], ["x.gguf"], ["x.gguf", "--out", "y", "--recipe", "tiny-int2"]])
def test_wrong_usage_ends_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m export" in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no file " in refusal(capsys, tmp_path / "nothing.gguf", "--out", tmp_path / "out")
    assert "Is a directory" in refusal(capsys, tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"PK\x03\x04 a zip file", b"GGUF", b"GGUF\x63\x00\x00\x00" + bytes(64)]
)
def test_what_is_no_gguf_is_said_to_be_none(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    line = refusal(capsys, path, "--out", tmp_path / "out")
    assert "is not a GGUF file" in line or "cut short or damaged" in line


@pytest.mark.parametrize("share", [0.001, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_refused(
    tmp_path: Path, tiny_gguf: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    assert "cut short or damaged" in refusal(capsys, path, "--out", tmp_path / "out")


def test_models_that_would_come_out_wrong_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra, missing, misshapen, mixed, unknown_type, damaged = (TinyLlama() for _ in range(6))
    extra.tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    del missing.blocks["blk.1.ffn_up.weight"]
    misshapen.tensors["output_norm.weight"] = np.ones(32, np.float32)
    mixed.formats["blk.0.attn_v.weight"] = BlockFormat.Q8_0
    mixed.blocks["blk.0.attn_v.weight"] = mixed.blocks["token_embd.weight"].rows(0, 32)
    del unknown_type.blocks["blk.0.attn_q.weight"]
    unknown_type.tensors["blk.0.attn_q.weight"] = np.zeros((64, 64), np.float16)
    damaged.blocks["blk.0.attn_q.weight"].scales[3, 1] = np.nan
    cases = {
        "'gemma'; this exporter knows 'llama'": TinyLlama(architecture="gemma"),
        "scales its rotary embedding ('yarn')": TinyLlama(metadata={"rope_scaling": gguf.RopeScalingType.YARN}),
        "splits text in the manner 'llama-bpe'": TinyLlama(metadata={"pre": "llama-bpe"}),
        "has no chat template": TinyLlama(metadata={"template": False}),
        "does not use (first: 'rope_freqs.weight')": extra,
        "has no tensor 'blk.1.ffn_up.weight'": missing,
        "'output_norm.weight' is (32,)": misshapen,
        "attn_q, attn_k, attn_v have different types (Q4_1, Q8_0)": mixed,
        "'blk.0.attn_q.weight' is stored as F16": unknown_type,
        "'blk.0.attn_q.weight' holds values that are not finite": damaged,
    }
    for sentence, model in cases.items():
        path = model.write(tmp_path / "model.gguf")
        assert sentence in refusal(capsys, path, "--out", tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    assert "is not a release" in refusal(capsys, tiny_gguf, "--out", tmp_path, "--model", "tiny", "--force")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def run_with(prelude: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process after `prelude`, Python code that plants an accident."""
    code = (
        f"import os, resource, signal, sys\n{prelude}\nfrom export.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def killed_at(moment: str) -> str:
    module = moment.rpartition(".")[0]
    return f"import {module}\n{moment} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("moment", "replaced"),
    [
        ("export.build.write_file", False),  # the weights are written, the graph is not
        ("export.build.measure_invariance", False),  # all but the manifest is written
        ("export.writer._publish", False),  # the manifest, too, but not in its place
        ("export.writer._sync_folder", False),
        ("shutil.rmtree", True),  # the new release is in its place, the old one not yet removed
    ],
)
def test_a_killed_export_leaves_a_whole_release_or_none(
    tmp_path: Path, tiny_gguf: Path, moment: str, replaced: bool
) -> None:
    out, fresh = tmp_path / "release", tmp_path / "fresh"
    assert main([str(tiny_gguf), "--out", str(out), "--recipe", "gguf-parity"]) == 0
    for place in (out, fresh):
        done = run_with(killed_at(moment), tiny_gguf, "--out", place)
        assert done.returncode == -9, done.stderr
    variant = decode_manifest((out / MANIFEST_NAME).read_bytes(), "out").variant
    assert (is_whole(out), variant) == (True, "gguf-exact" if replaced else "gguf-parity")
    assert fresh.exists() == replaced
    for place in (out, fresh):
        assert main([str(tiny_gguf), "--out", str(place), "--force"]) == 0
        assert is_whole(place)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["fresh", "release"]


def test_a_full_disk_gives_one_sentence_and_costs_nothing(tmp_path: Path, tiny_gguf: Path) -> None:
    out = tmp_path / "release"
    assert main([str(tiny_gguf), "--out", str(out), "--recipe", "gguf-parity"]) == 0
    # A limit on the size of files fails in the same calls as a full disk.
    done = run_with("resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))", tiny_gguf, "--out", out)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"export: No room for the release in {tmp_path}; free some space or choose another --out.\n"
    assert is_whole(out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["release"]


def test_an_interrupt_is_one_line_and_costs_nothing(tmp_path: Path, tiny_gguf: Path) -> None:
    prelude = """
import export.build
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has inherited SIG_IGN
export.build.write_file = lambda *_: os.kill(os.getpid(), signal.SIGINT)
"""
    done = run_with(prelude, tiny_gguf, "--out", tmp_path / "release")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines() == [f"export: interrupted; {tmp_path / 'release'} is as it was."]
    assert list(tmp_path.iterdir()) == []


def test_exporting_needs_neither_torch_nor_transformers(tmp_path: Path, tiny_gguf: Path) -> None:
    prelude = "sys.modules.update(torch=None, transformers=None)"  # None makes their import fail
    done = run_with(prelude, tiny_gguf, "--out", tmp_path / "release")
    assert done.returncode == 0, done.stderr


def test_a_missing_library_is_named(tmp_path: Path, tiny_gguf: Path) -> None:
    done = run_with("sys.modules.update(onnxruntime=None)", tiny_gguf, "--out", tmp_path / "release")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "onnxruntime is not installed" in done.stderr


def test_two_exports_to_one_place_do_not_mix(tmp_path: Path, tiny_gguf: Path) -> None:
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "export", str(tiny_gguf), "--out", str(tmp_path / "release")],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [command.communicate()[1] for command in commands]
    codes = sorted(command.returncode for command in commands)
    assert codes == [0, 0] or (codes == [0, 1] and "Another export is writing" in "".join(errors))
    assert is_whole(tmp_path / "release")


def test_a_moved_release_is_still_whole(tmp_path: Path, tiny_gguf: Path) -> None:
    assert main([str(tiny_gguf), "--out", str(tmp_path / "here"), "--model", "tiny"]) == 0
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert is_whole(tmp_path / "there")
