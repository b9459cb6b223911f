"""One argument names any checkpoint; what it cannot name is said in one sentence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from export.errors import SourceError
from export.sources.gguf import GgufCheckpoint
from export.sources.opening import open_checkpoint
from export.sources.safetensors import SafetensorsCheckpoint
from tests.tools.hf_checkpoints import write_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of safetensors."""
    return write_llama(tmp_path_factory.mktemp("source") / "tiny-llama", num_hidden_layers=1)


def refused(argument: str | Path, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        open_checkpoint(str(argument))


def test_a_gguf_file(tiny_gguf: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_gguf))
    assert isinstance(checkpoint, GgufCheckpoint)
    assert checkpoint.name == tiny_gguf.name


def test_a_folder_of_safetensors(folder: Path) -> None:
    checkpoint = open_checkpoint(f"{folder}/")
    assert isinstance(checkpoint, SafetensorsCheckpoint)
    assert checkpoint.name == "tiny-llama"


def test_the_folder_one_is_in_has_its_own_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert open_checkpoint(".").name == "tiny-llama"


def test_a_folder_with_one_gguf_file_and_nothing_else_is_that_file(tiny_gguf: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_gguf, tmp_path / "only.gguf")
    assert open_checkpoint(str(tmp_path)).name == "only.gguf"


def test_safetensors_are_preferred_to_a_gguf_beside_them(folder: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(folder, tmp_path / "both"))
    shutil.copy(tiny_gguf, both)
    assert isinstance(open_checkpoint(str(both)), SafetensorsCheckpoint)


def test_of_several_gguf_files_one_must_be_named(tiny_gguf: Path, tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        shutil.copy(tiny_gguf, tmp_path / name)
    refused(tmp_path, "has 2 GGUF files, such as a.gguf; name the one that is meant")


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, "has neither config.json nor a .gguf file")


def test_a_folder_with_a_config_alone_lacks_its_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    refused(tmp_path, "has neither model.safetensors nor model.safetensors.index.json")


def test_weights_without_a_config_lack_it(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model.safetensors", tmp_path)
    refused(tmp_path, "There is no file .*config.json")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_file_of_a_folder_is_not_the_folder(folder: Path, name: str) -> None:
    refused(folder / name, rf"{name} is one file of a checkpoint; name the folder that it lies in")


@pytest.mark.parametrize("argument", ["nothing", "./not/here", "/not/here", "a/b/c.gguf", "a/b.gguf", "a b/c", "a/b@"])
def test_nothing_there_is_told_what_could_be(argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(argument, r"There is nothing at .*; name a \.gguf file, a folder with .*, or a model on the hub")


def test_a_name_that_no_file_can_have_is_refused_too() -> None:
    refused("x" * 5000, r"cannot be read \(File name too long\)")


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not look into, even where the tests run as root."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o000)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)


@pytest.mark.parametrize("inner", [".", "model", "model.gguf"])
def test_what_may_not_be_read_is_said_so(locked: Path, inner: str) -> None:
    refused(locked / inner, r"locked.* cannot be read \(Permission denied\); check its rights")


def test_a_pipe_is_no_gguf_file_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "is not a regular file")
    refused(tmp_path, "pipe.gguf is not a regular file")
    refused("/dev/null", "/dev/null is not a regular file")


def test_a_folder_is_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").mkdir()
    refused(tmp_path / "model.gguf", "is not a regular file but an empty folder")


def test_a_name_for_the_hub_may_have_been_meant_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    refused(
        "models/missing", "^There is no folder 'models/missing' here, and the hub does not help: .* cannot be reached"
    )
