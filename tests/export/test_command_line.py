"""The command as a person meets it: sentences, exit codes, and nothing lost whatever happens."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from core.manifest import MANIFEST_NAME, encode_manifest
from export.__main__ import REFUSED, UNREAD, main
from export.build import export
from export.checks.verify import verify
from export.inspect import inspect
from export.recipes import Recipe
from export.release.data import DATA_FILE
from export.sources.opening import open_checkpoint
from tests.export.running import ROOT, is_whole, manifest_in, run_with
from tests.tools.gpt_oss_checkpoint import TINY, write_checkpoint


@pytest.fixture
def gpt_oss(tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may damage."""
    return write_checkpoint(tmp_path / "gpt-oss", TINY, tokenizer="tiny")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, which must refuse; returns its one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in (*arguments, "--no-run")]) == REFUSED == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("export: ")
    return lines[0]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_one_command_exports_and_says_what_it_did(
    tmp_path: Path, tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_gguf), "--out", str(tmp_path / "tiny-llama")]
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert told.out.startswith("tiny-llama@")
    assert "export: --recipe auto takes " in told.err
    assert is_whole(tmp_path / "tiny-llama")
    assert main(arguments) == 0
    assert "was there already" in capsys.readouterr().out


def test_the_model_can_have_another_name_than_its_folder(tmp_path: Path, tiny_gguf: Path) -> None:
    words = [str(tiny_gguf), "--out", str(tmp_path / "v1"), "--model", "tiny", "--recipe", "gguf-parity", "--no-run"]
    assert main(words) == 0
    manifest = manifest_in(tmp_path / "v1")
    assert (manifest.model, manifest.variant) == ("tiny", "gguf-parity")


def test_a_release_verifies_after_it_was_written_and_no_longer_when_it_was_damaged(
    tmp_path: Path, tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "release"
    assert main([str(tiny_gguf), "--out", str(out), "--recipe", "gguf-exact", "--no-run"]) == 0
    capsys.readouterr()
    assert main(["verify", str(out)]) == 0
    assert " 0 broken" in capsys.readouterr().out.splitlines()[-1]
    with (out / DATA_FILE).open("r+b") as file:
        file.write(b"\xff")
    assert main(["verify", str(out), "--json"]) == REFUSED
    assert not json.loads(capsys.readouterr().out)["ok"]


def test_help_teaches_recipes_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["verify"], ["inspect"]):
        with pytest.raises(SystemExit, match="0"):
            main([*words, "--help"])
        text = capsys.readouterr().out
        assert "python -m export " in text
        assert "example" in text
        assert max(map(len, text.splitlines())) <= 120
        if not words:
            assert all(f"\n  {recipe:<12} {recipe.purpose}" in text for recipe in Recipe)
            assert "python -m export openai/gpt-oss-20b --recipe cuda-int8" in text


@pytest.mark.parametrize(
    "arguments",
    [[], ["x.gguf"], ["x.gguf", "--out", "y", "--recipe", "tiny-int2"], ["verify"], ["inspect", "x", "--loud"]],
)
def test_wrong_usage_ends_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m export" in capsys.readouterr().err


def test_a_source_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing.gguf" in refusal(capsys, tmp_path / "nothing.gguf", "--out", tmp_path / "out")
    assert "config.json" in refusal(capsys, tmp_path, "--out", tmp_path / "out")
    assert names(tmp_path) == []


def test_a_recipe_that_does_not_fit_the_checkpoint_is_refused(
    tmp_path: Path, tiny_gguf: Path, gpt_oss: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, recipe in ((tiny_gguf, "cuda-fp4"), (tiny_gguf, "cpu-mxfp4"), (gpt_oss, "gguf-exact")):
        assert recipe in refusal(capsys, source, "--out", tmp_path / "out", "--recipe", recipe)
    assert names(tmp_path) == ["gpt-oss"]


def test_damage_in_the_middle_of_the_weights_is_named_and_leaves_nothing(
    tmp_path: Path, gpt_oss: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensor = "model.layers.2.self_attn.k_proj.weight"
    (extent,) = open_checkpoint(str(gpt_oss)).extents(tensor)
    with extent.path.open("r+b") as file:
        file.seek(extent.offset + 40)
        file.write(b"\xc0\x7f")  # NaN in bf16
    line = refusal(capsys, gpt_oss, "--out", tmp_path / "out", "--recipe", "cpu-int8")
    assert tensor in line
    assert str(extent.path) in line
    assert names(tmp_path) == ["gpt-oss"]


def test_numbers_that_a_recipe_cannot_hold_are_named(
    tmp_path: Path, gpt_oss: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensor = "model.layers.1.mlp.experts.down_proj"
    extent = open_checkpoint(str(gpt_oss)).extents(tensor)[1]
    with extent.path.open("r+b") as file:
        file.seek(extent.offset)
        file.write(bytes([170]))  # 2**43: beyond float16
    line = refusal(capsys, gpt_oss, "--out", tmp_path / "out", "--recipe", "cuda-int8")
    assert tensor in line
    assert "another --recipe" in line
    assert names(tmp_path) == ["gpt-oss"]
    assert main([str(gpt_oss), "--out", str(tmp_path / "out"), "--recipe", "cuda-fp4", "--no-run"]) == 0


def test_rows_that_cannot_be_cut_into_blocks_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = write_checkpoint(tmp_path / "odd", replace(TINY, heads=3, kv_heads=1, head_dim=16), tokenizer="tiny")
    line = refusal(capsys, odd, "--out", tmp_path / "out", "--recipe", "cpu-int8")
    assert "model.layers.0.self_attn.o_proj.weight" in line
    assert "cannot be cut into blocks of 32" in line


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    assert "is not a release" in refusal(capsys, tiny_gguf, "--out", tmp_path, "--model", "tiny", "--force")
    assert names(tmp_path) == ["thesis.txt"]


def killed_at(moment: str) -> str:
    """The process kills itself instead of calling a function, or after it."""
    name = moment.removeprefix("after ")
    first = "function(*words)" if name != moment else ""
    return f"""
import {name.rpartition(".")[0]}
function = {name}
def end(*words):
    {first}
    os.kill(os.getpid(), signal.SIGKILL)
{name} = end
"""


@pytest.mark.parametrize(
    ("moment", "replaced"),
    [
        ("export.build.write_file", False),  # the weights are written, the graph is not
        ("export.build.encode_manifest", False),  # all but the manifest is written
        ("export.release.writer._publish", False),  # the manifest, too, but not in its place
        ("export.release.writer._sync_folder", False),
        ("after export.release.writer._publish", True),  # the new release is in its place, the old one not yet removed
    ],
)
def test_a_killed_export_leaves_a_whole_release_or_none(
    tmp_path: Path, tiny_gguf: Path, moment: str, replaced: bool
) -> None:
    out, fresh = tmp_path / "release", tmp_path / "fresh"
    words = [str(tiny_gguf), "--no-run", "--recipe"]
    assert main([*words, "gguf-parity", "--out", str(out)]) == 0
    for place in (out, fresh):
        done = run_with(killed_at(moment), *words, "gguf-exact", "--out", place)
        assert done.returncode == -9, done.stderr
    assert (is_whole(out), manifest_in(out).variant) == (True, "gguf-exact" if replaced else "gguf-parity")
    assert fresh.exists() == replaced
    for place in (out, fresh):
        assert main([*words, "gguf-exact", "--out", str(place), "--force"]) == 0
        assert is_whole(place)
    assert names(tmp_path) == ["fresh", "release"]


def test_a_disk_that_fills_up_gives_one_sentence_and_costs_nothing(tmp_path: Path, tiny_gguf: Path) -> None:
    out = tmp_path / "release"
    words = [tiny_gguf, "--out", out, "--no-run", "--recipe"]
    assert main([*map(str, words), "gguf-parity"]) == 0
    # A limit on the size of files fails in the same calls as a full disk.
    done = run_with("resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))", *words, "gguf-exact")
    assert (done.returncode, done.stdout) == (REFUSED, "")
    assert done.stderr == f"export: No room for the release in {tmp_path}; free some space or choose another --out.\n"
    assert is_whole(out)
    assert names(tmp_path) == ["release"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room_is_refused_beforehand_with_both_figures(
    small_disk: Path, gpt_oss: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, gpt_oss, "--out", small_disk / "release", "--recipe", "cpu-int8")
    assert "The release needs 50.5 MB" in line
    assert "which has 4.2 MB free" in line
    assert names(small_disk) == []


def test_an_interrupt_before_anything_was_written_is_one_line(tmp_path: Path, tiny_gguf: Path) -> None:
    prelude = """
import export.build
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has inherited SIG_IGN
export.build.open_checkpoint = lambda *_: os.kill(os.getpid(), signal.SIGINT)
"""
    done = run_with(prelude, tiny_gguf, "--out", tmp_path / "release")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines() == [f"export: interrupted, {tmp_path / 'release'} is as it was."]
    assert names(tmp_path) == []


def test_exporting_needs_neither_torch_nor_transformers(tmp_path: Path, tiny_gguf: Path) -> None:
    prelude = "sys.modules.update(torch=None, transformers=None)"  # None makes their import fail
    done = run_with(prelude, tiny_gguf, "--out", tmp_path / "release")
    assert done.returncode == 0, done.stderr


def test_without_a_runtime_a_release_is_written_and_says_that_it_was_not_tried(tmp_path: Path, tiny_gguf: Path) -> None:
    prelude = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "onnxruntime" else find(name, *more)
sys.modules.update(onnxruntime=None)
"""
    done = run_with(prelude, tiny_gguf, "--out", tmp_path / "release")
    assert done.returncode == 0, done.stderr
    assert "not measured: onnxruntime is not installed" in manifest_in(tmp_path / "release").claims["batches"]
    assert "not measured: onnxruntime is not installed" in done.stderr


def test_a_missing_library_is_named(tmp_path: Path, tiny_gguf: Path) -> None:
    done = run_with("sys.modules.update(onnx=None)", tiny_gguf, "--out", tmp_path / "release")
    assert (done.returncode, done.stderr.count("\n")) == (REFUSED, 1)
    assert "onnx is not installed" in done.stderr


def test_two_exports_to_one_place_do_not_mix(tmp_path: Path, tiny_gguf: Path) -> None:
    words = [sys.executable, "-m", "export", str(tiny_gguf), "--out", str(tmp_path / "release"), "--no-run"]
    commands = [subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [command.communicate()[1] for command in commands]
    codes = sorted(command.returncode for command in commands)
    assert codes == [0, 0] or (codes == [0, REFUSED] and "Another export is writing" in "".join(errors))
    assert is_whole(tmp_path / "release")


def test_a_moved_release_is_still_whole(tmp_path: Path, tiny_gguf: Path) -> None:
    assert main([str(tiny_gguf), "--out", str(tmp_path / "here"), "--model", "tiny", "--no-run"]) == 0
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert is_whole(tmp_path / "there")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> Path:
    """A release that no test changes, of a model whose name is beyond ASCII."""
    folder = tmp_path_factory.mktemp("spoken") / "release"
    assert main([str(tiny_gguf), "--out", str(folder), "--recipe", "gguf-exact", "--no-run"]) == 0
    manifest = manifest_in(folder)
    source = msgspec.structs.replace(manifest.source, name="Modell-Größe-模型")
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(msgspec.structs.replace(manifest, source=source)))
    return folder


def in_shell(line: str, *words: object) -> subprocess.CompletedProcess[str]:
    """A line of a shell in which "$@" is the exporter and its words."""
    command = [sys.executable, "-m", "export", *map(str, words)]
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}", "bash", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_reader_that_has_enough_is_no_error(release: Path, command: str) -> None:
    # `true` reads nothing at all, so that the first line already finds nobody.
    done = in_shell('{ sleep 0.2; "$@"; } | true', command, release)
    assert (done.returncode, done.stderr) == (UNREAD, "")


def test_help_that_nobody_reads_is_no_error() -> None:
    done = in_shell('{ sleep 0.2; "$@"; } | true', "--help")
    assert done.returncode in (0, UNREAD)  # argparse may have met the broken pipe first; it says nothing
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--json"], ["verify"], ["verify", "--json"]])
def test_output_that_cannot_be_written_is_one_sentence(release: Path, words: list[str]) -> None:
    done = in_shell('"$@" > /dev/full', *words, release)
    assert done.returncode == REFUSED
    assert done.stderr == ("export: The output cannot be written (No space left on device); send it somewhere else.\n")


def test_an_export_that_nobody_listens_to_still_exports(tmp_path: Path, tiny_gguf: Path) -> None:
    done = in_shell('"$@" 2> /dev/full', tiny_gguf, "--out", tmp_path / "release", "--no-run")
    assert done.returncode == 0
    assert is_whole(tmp_path / "release")


def test_a_terminal_without_the_letters_gets_escapes(release: Path) -> None:
    done = in_shell('PYTHONIOENCODING=ascii "$@"', "inspect", release)
    assert done.returncode == 0, done.stderr
    assert r"Modell-Gr\xf6\xdfe-\u6a21\u578b" in done.stdout


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not look into, even where the tests run as root."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o000)
    assert all((export, inspect, verify))  # imported by now: another user may not find the libraries
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)


def test_what_may_not_be_read_is_one_sentence(
    locked: Path, tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["inspect", locked / "release"],
        [locked, "--out", "release"],
        [tiny_gguf, "--out", locked / "release"],
    ):
        assert main([str(word) for word in words]) == REFUSED
        (line,) = capsys.readouterr().err.splitlines()
        assert re.match(r"export: /.* cannot be read \(Permission denied\); ", line)
    assert main(["verify", str(locked / "release")]) == REFUSED
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_whose_name_no_model_can_have_is_told_of_the_way_out(
    tmp_path: Path, tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, tiny_gguf, "--out", tmp_path / "My Model")
    assert "The model name 'My Model' may hold only" in line
    assert line.endswith("; it is the name of the folder, --model NAME chooses another.")
    asked = refusal(capsys, tiny_gguf, "--out", tmp_path / "tiny", "--model", "My Model")
    assert "the name of the folder" not in asked


@pytest.mark.parametrize(
    "words",
    [
        ["{path}", "--out", "release"],
        ["{path}.gguf", "--out", "release"],
        ["x.gguf", "--out", "{path}"],
        ["x.gguf", "--out", "{path}", "--model", "tiny"],
        ["verify", "{path}"],
        ["inspect", "{path}"],
    ],
)
@pytest.mark.parametrize("path", ["/" + "p" * 5000, "/" + "folder/" * 500])
def test_a_path_of_thousands_of_characters_is_shortened(
    capsys: pytest.CaptureFixture[str], words: list[str], path: str
) -> None:
    assert main([word.format(path=path) for word in words]) == REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 500
