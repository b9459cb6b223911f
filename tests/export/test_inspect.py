"""What a person reads about a release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.__main__ import REFUSED, main
from export.build import Order, export
from export.inspect import WIDTH
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


def test_the_page_fits_a_terminal(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert max(len(line) for line in page(release, capsys)) <= WIDTH


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
