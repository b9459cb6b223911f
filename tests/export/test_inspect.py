"""What a person reads about a release."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from core.manifest import MANIFEST_NAME, encode_manifest
from export.__main__ import REFUSED, main
from export.build import Order, export
from export.inspect import WIDTH, tell_story
from export.recipes import Recipe
from tests.export.running import manifest_in
from tests.tools.gpt_oss_checkpoint import TINY, write_checkpoint


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt-oss in 4 bits, tried on this machine."""
    folder = tmp_path_factory.mktemp("release")
    source = write_checkpoint(folder / "tiny-gpt-oss", TINY, tokenizer="tiny")
    export(Order(str(source), folder / "release", "tiny", Recipe.CPU_INT4))
    return folder / "release"


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of WIDTH columns, wherever the tests run."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def page(release: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["inspect", str(release)]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_page_says_what_it_is_how_large_how_good_and_how_it_talks(
    release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = page(release, capsys)
    text = "\n".join(lines)
    assert lines[0] == f"{manifest_in(release).release}  (cpu-int4)"
    for words in (
        "source          tiny-gpt-oss (GptOssForCausalLM)",
        "speech          harmony, ends at ",
        "  model.onnx.data ",
        "in float32",
        "perplexity ",
        "compared with   the same weights in float32",
        "golden prompts",
        "  -> ",
        "smallest margin ",
    ):
        assert words in text
    (experts,) = (line for line in lines if line.startswith("  4-bit blocks of 32 "))
    assert "error 0.07" in experts
    assert f"{TINY.layers * 2} tensors" in experts


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_page_fits_the_terminal(
    release: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lengths = [len(line) for line in page(release, capsys)]
    assert max(lengths) <= width
    assert max(lengths) > width - 8  # and uses it


def with_manifest(release: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the release that says something else of itself."""
    copy = Path(shutil.copytree(release, folder / "copy"))
    manifest = msgspec.structs.replace(manifest_in(release), **changes)
    (copy / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return copy


def test_nothing_in_a_manifest_steers_the_terminal(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = msgspec.structs.replace(manifest_in(release).source, name="x\x1b[2J\x9b31m\r\u202e" + "y" * 300)
    changed = with_manifest(release, tmp_path, source=source, claims={"a\x07": "b\x1b]0;title\x07"})
    lines = page(changed, capsys)
    assert all(line.isprintable() and len(line) <= WIDTH for line in lines)
    assert any("x?[2J?31m" in line for line in lines)


@pytest.mark.parametrize("stranger", [10**9, -5, 1 << 40])
def test_ids_that_the_tokenizer_does_not_know_are_shown_as_numbers(release: Path, stranger: int) -> None:
    tokenizer = Tokenizer.from_file(str(release / "tokenizer.json"))
    known = manifest_in(release).golden[0]
    assert tell_story(tokenizer, known).untold is None
    story = tell_story(tokenizer, msgspec.structs.replace(known, ids=[stranger, 7]))
    assert story.continuation == f"[{stranger}, 7]"
    assert story.untold == f"the tokenizer does not know the id {stranger}"


def test_a_damaged_tokenizer_costs_the_text_and_nothing_else(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = with_manifest(release, tmp_path)
    (copy / "tokenizer.json").write_bytes(b"\xff{")
    lines = page(copy, capsys)
    assert any("shown as ids: tokenizer.json is no tokenizer (" in line for line in lines)
    assert any(line.startswith("  -> [") for line in lines)


def test_programs_get_all_of_it(release: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["inspect", str(release), "--json"]) == 0
    content = json.loads(capfdbinary.readouterr().out)
    manifest = manifest_in(release)
    assert content["manifest"]["release"] == manifest.release
    assert content["quality"]["totals"]["bytes"] == (release / "model.onnx.data").stat().st_size
    assert len(content["golden"]) == len(manifest.golden) > 0
    assert all(
        isinstance(story["prompt"], str) and isinstance(story["continuation"], str) for story in content["golden"]
    )


def test_a_release_that_never_ran_says_so(tmp_path: Path, tiny_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(Order(str(tiny_gguf), tmp_path / "release", "tiny", Recipe.GGUF_EXACT, run=False))
    lines = page(tmp_path / "release", capsys)
    assert lines[lines.index("quality") + 1] == "  not measured: the export was made with --no-run"
    assert "golden prompts" not in lines


def test_what_is_no_release_is_refused_in_one_sentence(
    tmp_path: Path, tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = tmp_path / "release"
    export(Order(str(tiny_gguf), release, "tiny", Recipe.GGUF_EXACT, run=False))
    capsys.readouterr()

    def refusal(folder: Path) -> str:
        assert main(["inspect", str(folder)]) == REFUSED
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert f"There is no release in {tmp_path}" in refusal(tmp_path)
    (release / "quality.json").write_text("{}")
    assert "quality.json is not a quality report" in refusal(release)
    (release / "tokenizer.json").unlink()
    assert "lacks the file 'tokenizer.json'" in refusal(release)
