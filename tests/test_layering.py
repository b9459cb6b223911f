"""The walls of ARCHITECTURE section 1: core < pure < I/O < `__main__`, and packages that do not know each other.

Every module has a line in ROOMS, or a room that has one. A pure (P) module gets time, randomness and bytes as
arguments: it imports the standard modules in DETERMINISTIC, the libraries named on its line, and pure modules.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("core", "edge_node", "router", "export", "scripts")
FOLDERS = ("core", "edge_node", "router", "export", "scripts/supervisor")
"""Where the packages lie. The other scripts are tools, which may look into everything."""

Layer = Literal["pure", "io", "main"]
LEVEL: Mapping[Layer, int] = {"pure": 0, "io": 1, "main": 2}


@dataclass(frozen=True, slots=True)
class Room:
    """The layer of the modules that match `pattern`, and the libraries that a pure one may use."""

    pattern: str
    layer: Layer
    libraries: frozenset[str] = frozenset()


def pure(pattern: str, *libraries: str) -> Room:
    """Decisions: events and `now` in, effects out. msgspec carries them, so every pure module may use it."""
    return Room(pattern, "pure", frozenset({"msgspec", *libraries}))


def io(pattern: str) -> Room:
    """Bytes, sockets, files, processes, clocks."""
    return Room(pattern, "io")


ROOMS = (
    # The first that matches decides.
    Room("*.__main__", "main"),
    pure("core"),
    pure("core.*"),
    pure("edge_node"),
    pure("edge_node.config"),
    pure("edge_node.supervision"),
    pure("edge_node.residents"),
    pure("edge_node.switchboard"),
    pure("edge_node.engine.grammar", "llguidance", "numpy"),
    pure("edge_node.engine.logprobs", "numpy"),
    pure("edge_node.engine.penalties", "numpy"),
    pure("edge_node.engine.rows", "numpy"),
    pure("edge_node.engine.sampling", "numpy"),
    pure("edge_node.engine.step", "numpy"),
    pure("edge_node.engine.engine", "numpy"),
    pure("edge_node.engine.speech.chat_template", "jinja2", "tokenizers"),
    pure("edge_node.engine.speech.detokeniser", "tokenizers"),
    pure("edge_node.engine.speech.encoding", "tokenizers"),
    pure("edge_node.engine.speech.harmony", "tokenizers"),
    pure("edge_node.engine.speech.prompt", "tokenizers"),
    pure("edge_node.engine"),
    pure("edge_node.engine.*"),
    pure("edge_node.release"),
    pure("edge_node.release.reload"),
    pure("edge_node.release.servable"),
    io("edge_node.release.model_store"),
    pure("edge_node.runtime"),
    pure("edge_node.runtime.pipe"),
    io("edge_node.runtime.*"),
    io("edge_node.admin"),
    io("edge_node.link"),
    io("edge_node.logs"),
    io("edge_node.node"),
    io("edge_node.registry"),
    pure("router"),
    pure("router.api"),
    pure("router.api.*"),
    pure("router.auth"),
    pure("router.backoff"),
    pure("router.config"),
    pure("router.effects"),
    pure("router.errors"),
    pure("router.fleet"),
    pure("router.journal"),
    pure("router.limits"),
    pure("router.policy"),
    pure("router.predictor"),
    pure("router.reading_pace"),
    pure("router.rollout"),
    pure("router.salts"),
    pure("router.session"),
    pure("router.terms"),
    io("router.admin"),
    io("router.dispatch"),
    io("router.finder"),
    io("router.http"),
    io("router.keeper"),
    io("router.shelf"),
    io("router.http.*"),
    io("router.link"),
    io("router.metrics"),
    io("router.peers"),
    io("router.registry"),
    io("router.server"),
    io("router.sessions"),
    pure("router.store"),
    pure("router.store.held"),
    pure("router.store.packing"),
    io("router.store.*"),
    pure("export"),
    io("export.build"),
    io("export.hardware"),
    io("export.inspect"),
    io("export.progress"),
    pure("export.choice"),
    pure("export.errors"),
    pure("export.recipes", "numpy"),
    pure("export.spec"),
    pure("export.checks"),
    pure("export.checks.report"),
    io("export.checks.*"),
    pure("export.forms"),
    pure("export.forms.*", "numpy"),
    pure("export.graphs"),
    pure("export.graphs.*", "numpy", "onnx"),
    pure("export.release"),
    pure("export.release.places", "numpy", "onnx"),
    io("export.release.*"),
    pure("export.sources"),
    pure("export.sources.ggml", "numpy"),
    pure("export.sources.gguf_*", "numpy"),
    pure("export.sources.hf_config"),
    pure("export.sources.hf_json"),
    pure("export.sources.hf_speech", "jinja2", "tokenizers"),
    pure("export.sources.safetensors_header"),
    pure("export.sources.speech"),
    io("export.sources.*"),
    pure("export.trial"),
    pure("export.trial.golden", "numpy"),
    pure("export.trial.invariance", "numpy"),
    pure("export.trial.quality", "numpy"),
    pure("export.trial.quality_report"),
    io("export.trial.*"),
    pure("scripts.supervisor"),
    pure("scripts.supervisor.machine"),
    pure("scripts.supervisor.plan"),
    io("scripts.supervisor.*"),
)

# fmt: off
DETERMINISTIC = frozenset({
    "__future__", "abc", "array", "base64", "binascii", "bisect", "codecs", "collections", "collections.abc", "copy",
    "dataclasses", "enum", "functools", "hashlib", "heapq", "hmac", "ipaddress", "itertools", "json", "math",
    "operator", "re", "string", "struct", "tomllib", "types", "typing", "unicodedata", "urllib.parse", "zlib",
})
# fmt: on
"""What of the standard library gives the same answer every time; everything else is for I/O modules."""

MAY_KNOW: Mapping[str, frozenset[str]] = {
    "core": frozenset({"core"}),
    "edge_node": frozenset({"core", "edge_node"}),
    "router": frozenset({"core", "router"}),
    "export": frozenset({"core", "export"}),
    "scripts": frozenset({"scripts"}),
}

ONLY_IN: Mapping[str, Mapping[str, str | None]] = {
    "onnxruntime": {"edge_node": "edge_node.runtime.runner", "export": "export.trial.run", "router": None},
    "consul": {"edge_node": "edge_node.registry", "router": "router.registry", "export": None},
    "redis": {"edge_node": None, "router": "router.store.redis", "export": None},
}
"""Library -> package -> the one module that may import it."""


@dataclass(frozen=True, slots=True)
class Import:
    """One name that a module imports, in full, and the line that does it."""

    target: str
    line: int


def module_name(path: Path) -> str:
    """Return the dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Return every module of ours with its file."""
    return {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


def room_of(module: str) -> Room | None:
    """Return the first room that the module matches."""
    return next((room for room in ROOMS if fnmatchcase(module, room.pattern)), None)


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Return what a module imports, wherever in the file, for typing only included."""
    return tuple(_imports(module, ast.parse(modules()[module].read_text())))


def _imports(module: str, tree: ast.Module) -> Iterator[Import]:
    package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield Import(alias.name, statement.lineno)
        elif isinstance(statement, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - statement.level + 1] if statement.level else []
            source = ".".join([*above, *([statement.module] if statement.module else [])])
            for alias in statement.names:
                inner = f"{source}.{alias.name}"
                yield Import(inner if inner in modules() else source, statement.lineno)


def where(module: str, found: Import) -> str:
    """Say which line imports what."""
    return f"{modules()[module].relative_to(ROOT)}:{found.line} imports {found.target}"


def trespasses(module: str) -> Iterator[str]:
    """Yield a sentence for each import that goes through a wall."""
    room = room_of(module)
    if room is None:
        yield f"{module} is not classified: give it a line in ROOMS of tests/test_layering.py, pure or io."
        return
    package = module.partition(".")[0]
    for found in imports(module):
        head = found.target.partition(".")[0]
        if head in PACKAGES:
            yield from _trespass_inside(module, room, package, found)
        elif head == "tests":
            yield f"{where(module, found)}: what serves must not need what tests."
        elif room.layer == "pure":
            yield from _trespass_outside(module, room, found, head)


def _trespass_inside(module: str, room: Room, package: str, found: Import) -> Iterator[str]:
    head = found.target.partition(".")[0]
    if head not in MAY_KNOW[package]:
        yield f"{where(module, found)}: {package} does not know {head}; what both need belongs in core."
        return
    other = room_of(found.target)
    if other is None:
        yield f"{where(module, found)}, which does not exist or is not classified."
    elif LEVEL[other.layer] > LEVEL[room.layer] or (other.layer == "main" and module != found.target):
        yield f"{where(module, found)}: {room.layer} must not know {other.layer}; hand it in as an argument."


def _trespass_outside(module: str, room: Room, found: Import, head: str) -> Iterator[str]:
    if head in sys.stdlib_module_names or head == "__future__":
        if found.target not in DETERMINISTIC:
            yield f"{where(module, found)}: a pure module takes time, chance, files and sockets as arguments."
    elif head not in room.libraries:
        yield f"{where(module, found)}: {room.pattern} may use {sorted(room.libraries)}."


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_goes_through_a_wall(package: str) -> None:
    found = [words for module in modules() if module.partition(".")[0] == package for words in trespasses(module)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_with_one_door_is_imported_there_and_nowhere_else(library: str) -> None:
    importers = {
        module for module in modules() for found in imports(module) if found.target.partition(".")[0] == library
    }
    assert importers == {module for module in ONLY_IN[library].values() if module}


def test_the_engine_runs_without_a_socket_or_a_clock_in_sight() -> None:
    reached, waiting = set(), [module for module in modules() if module.startswith("edge_node.engine")]
    while waiting:
        module = waiting.pop()
        if module in reached:
            continue
        reached.add(module)
        waiting += [found.target for found in imports(module) if found.target in modules()]
    rooms = {module: room_of(module) for module in reached}
    assert {module for module, room in rooms.items() if room is None or room.layer != "pure"} == set()


class TestTheCheckItself:
    """A layering test that finds nothing is worth nothing: each wall is shown to hold."""

    @pytest.fixture
    def tree(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
        modules.cache_clear()
        imports.cache_clear()
        yield tmp_path
        modules.cache_clear()
        imports.cache_clear()

    @pytest.mark.parametrize(
        ("module", "source", "words"),
        [
            ("router/policy.py", "import time", "takes time, chance, files and sockets as arguments"),
            ("router/policy.py", "def f():\n    import random", "router/policy.py:2 imports random"),
            ("router/policy.py", "from os import path", "imports os"),
            ("router/policy.py", "import urllib.request", "imports urllib.request"),
            ("router/policy.py", "import numpy", "may use ['msgspec']"),
            ("router/policy.py", "from router import link", "pure must not know io"),
            ("router/policy.py", "from . import link", "pure must not know io"),
            ("router/api/call.py", "from ..link import Link", "pure must not know io"),
            ("router/link.py", "from router.__main__ import main", "io must not know main"),
            ("router/link.py", "import edge_node.config", "router does not know edge_node"),
            ("core/frames.py", "import router.link", "core does not know router"),
            ("core/frames.py", "import tests.fakes", "must not need what tests"),
            ("router/novelty.py", "", "router.novelty is not classified"),
        ],
    )
    def test_a_trespass_is_found_and_said_in_one_sentence(
        self, tree: Path, module: str, source: str, words: str
    ) -> None:
        files = {"router/link.py": "", "router/__main__.py": "", "edge_node/config.py": "", module: source}
        for name, text in files.items():
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (found,) = trespasses(module_name(tree / module))
        assert words in found
        assert "\n" not in found

    def test_what_is_allowed_passes(self, tree: Path) -> None:
        (tree / "router/api").mkdir(parents=True)
        (tree / "router/fleet.py").write_text("from __future__ import annotations\nimport msgspec, hashlib")
        (tree / "router/link.py").write_text("import asyncio, websockets\nfrom router import fleet")
        (tree / "router/api/call.py").write_text("from ..fleet import Fleet\nfrom urllib.parse import quote")
        assert [words for module in modules() for words in trespasses(module)] == []
