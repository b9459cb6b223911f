"""An export that was killed is continued, and nobody can tell from the release that it was."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from export.__main__ import INTERRUPTED, main
from export.build import Order, export
from export.recipes import Recipe
from export.release.data import DATA_FILE
from export.release.writer import staging_of
from tests.export.running import contents, run_with, stopped_after
from tests.tools.gpt_oss_checkpoint import TINY, write_checkpoint

RECIPE = Recipe.CUDA_FP4  # its arrays are joined along both axes

Words = list[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", TINY, tokenizer="tiny")


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release of an export that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "release"
    export(Order(str(checkpoint), out, "tiny", RECIPE, run=False))
    return out


def command(checkpoint: Path, out: Path, *more: str) -> Words:
    return [str(checkpoint), "--out", str(out), "--model", "tiny", "--recipe", RECIPE, "--no-run", *more]


def half_written(checkpoint: Path, out: Path, whole: Path, share: float = 0.6) -> None:
    """Kill an export to `out` when it has come so far."""
    size_bytes = (whole / DATA_FILE).stat().st_size
    killed = run_with(stopped_after(int(size_bytes * share), "SIGKILL"), *command(checkpoint, out))
    assert killed.returncode == -9, killed.stderr
    assert not out.exists()


@pytest.mark.parametrize("share", random.Random(3).choices([number / 1000 for number in range(1000)], k=5))
def test_a_killed_export_is_continued_to_the_very_same_bytes(
    tmp_path: Path, checkpoint: Path, whole: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "release"
    half_written(checkpoint, out, whole, share)
    assert main(command(checkpoint, out, "--resume")) == 0
    assert "export: continuing after " in capsys.readouterr().err
    assert contents(out) == contents(whole)
    assert [entry.name for entry in tmp_path.iterdir()] == ["release"]


def test_what_is_kept_is_not_written_again(tmp_path: Path, checkpoint: Path, whole: Path) -> None:
    out = tmp_path / "release"
    half_written(checkpoint, out, whole)
    partial = staging_of(out).release / DATA_FILE
    written = partial.stat().st_ino
    continued = run_with(stopped_after(int((whole / DATA_FILE).stat().st_size * 0.6), "SIGKILL"), *command(
        checkpoint, out, "--resume"
    ))  # fmt: skip
    assert continued.returncode == 0, continued.stderr  # there was less left to write than half
    assert (out / DATA_FILE).stat().st_ino == written
    assert contents(out) == contents(whole)


def test_an_export_may_be_killed_again_and_again(tmp_path: Path, checkpoint: Path, whole: Path) -> None:
    out = tmp_path / "release"
    half_written(checkpoint, out, whole, 0.45)
    largest = (whole / DATA_FILE).stat().st_size * 45 // 100  # weight: a table of the rotary embedding
    codes = [run_with(stopped_after(largest, "SIGKILL"), *command(checkpoint, out, "--resume")).returncode]
    codes += [main(command(checkpoint, out, "--resume"))]
    assert codes == [-9, 0]
    assert contents(out) == contents(whole)


def test_bytes_that_changed_meanwhile_are_written_again(tmp_path: Path, checkpoint: Path, whole: Path) -> None:
    out = tmp_path / "release"
    half_written(checkpoint, out, whole)
    with (staging_of(out).release / DATA_FILE).open("r+b") as file:
        file.seek(100_000)
        byte = file.read(1)
        file.seek(100_000)
        file.write(bytes([byte[0] ^ 1]))
    assert main(command(checkpoint, out, "--resume")) == 0
    assert contents(out) == contents(whole)


def test_a_journal_without_its_data_is_worth_nothing(
    tmp_path: Path, checkpoint: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "release"
    half_written(checkpoint, out, whole)
    (staging_of(out).release / DATA_FILE).write_bytes(b"")
    assert main(command(checkpoint, out, "--resume")) == 0
    assert "continuing after 0 of" in capsys.readouterr().err
    assert contents(out) == contents(whole)


def test_a_kill_after_the_weights_costs_only_what_came_after(tmp_path: Path, checkpoint: Path, whole: Path) -> None:
    out = tmp_path / "release"
    prelude = "import export.build\nexport.build.encode_manifest = lambda _: os.kill(os.getpid(), signal.SIGKILL)"
    assert run_with(prelude, *command(checkpoint, out)).returncode == -9
    finished = run_with(stopped_after(0, "SIGKILL"), *command(checkpoint, out, "--resume"))
    assert finished.returncode == 0, finished.stderr  # not one byte of weights was written
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_is_one_line_that_says_how_to_go_on(
    tmp_path: Path, checkpoint: Path, whole: Path, signal_name: str
) -> None:
    out = tmp_path / "release"
    words = command(checkpoint, out)
    interrupted = run_with(stopped_after(1_000_000, signal_name), *words)
    assert (interrupted.returncode, interrupted.stdout) == (INTERRUPTED, "")
    assert interrupted.stderr.splitlines() == [
        f"export: interrupted, {out} is as it was; the same command with --resume continues."
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == [".release.partial"]
    assert main([*words, "--resume"]) == 0
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_comes_when_the_release_is_in_place_is_too_late(
    tmp_path: Path, checkpoint: Path, whole: Path, signal_name: str
) -> None:
    out = tmp_path / "release"
    prelude = f"""
import export.release.writer as writer
publish = writer._publish
def publish_disturbed(folder, out):
    os.kill(os.getpid(), signal.{signal_name})
    publish(folder, out)
    os.kill(os.getpid(), signal.{signal_name})
writer._publish = publish_disturbed
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has inherited SIG_IGN
"""
    done = run_with(prelude, *command(checkpoint, out))
    assert done.returncode == 0, done.stderr
    assert "as it was" not in done.stderr
    assert contents(out) == contents(whole)
    assert [entry.name for entry in tmp_path.iterdir()] == ["release"]


def test_without_resume_a_leftover_is_cleared(
    tmp_path: Path, checkpoint: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "release"
    half_written(checkpoint, out, whole)
    assert main(command(checkpoint, out)) == 0
    assert "continuing" not in capsys.readouterr().err
    assert contents(out) == contents(whole)
    assert [entry.name for entry in tmp_path.iterdir()] == ["release"]


def test_with_nothing_to_continue_an_export_begins_anew_and_says_so(
    tmp_path: Path, checkpoint: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(checkpoint, tmp_path / "release", "--resume")) == 0
    assert "there is no unfinished export to continue" in capsys.readouterr().err
    assert contents(tmp_path / "release") == contents(whole)


def test_what_was_begun_in_another_way_is_not_continued(
    tmp_path: Path, checkpoint: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "release"
    half_written(checkpoint, out, whole)
    other = [*command(checkpoint, out, "--resume", "--dense", "exact")]
    assert main(other) == 0
    assert "another checkpoint, or another way" in capsys.readouterr().err
    assert contents(out) != contents(whole)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_checkpoint_that_changed_behind_its_time_of_modification_is_another_checkpoint(
    tmp_path: Path, whole: Path, in_place: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `rsync --inplace --times` changes it, or a copy that keeps times."""
    own = write_checkpoint(tmp_path / "own", TINY, tokenizer="tiny")
    out = tmp_path / "release"
    half_written(own, out, whole)
    shard = next(own.glob("*.safetensors"))
    before, data = shard.stat(), bytearray(shard.read_bytes())
    data[-1] ^= 1
    changed = shard if in_place else tmp_path / "copy"
    changed.write_bytes(data)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed.replace(shard)
    assert main(command(own, out, "--resume")) == 0
    assert "another checkpoint, or another way" in capsys.readouterr().err


def test_a_checkpoint_that_was_touched_is_another_checkpoint(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_checkpoint(tmp_path / "own", TINY, tokenizer="tiny")
    out = tmp_path / "release"
    half_written(own, out, whole)
    shard = next(own.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    assert main(command(own, out, "--resume")) == 0
    assert "another checkpoint, or another way" in capsys.readouterr().err


def test_an_unfinished_export_beside_a_release_that_is_up_to_date_is_cleared(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "release"
    assert main(command(checkpoint, out)) == 0
    assert run_with(stopped_after(1_000_000, "SIGKILL"), *command(checkpoint, out, "--force")).returncode == -9
    assert staging_of(out).journal.exists()
    assert main(command(checkpoint, out, "--resume")) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["release"]
