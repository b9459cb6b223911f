"""The checkpoint that a person named: a GGUF file, a folder, or a model on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from export.errors import SourceError
from export.sources.checkpoint import Checkpoint
from export.sources.gguf import GgufCheckpoint
from export.sources.safetensors import SafetensorsCheckpoint
from export.sources.safetensors_files import INDEX, SINGLE

#: organisation/name, and @revision (a branch, a tag, a commit) if somebody wants another one than the newest.
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)


def open_checkpoint(argument: str) -> Checkpoint:
    """Open what `argument` names, fetching it first if it is on the hub; raises SourceError with one sentence."""
    path = Path(argument)
    try:
        local = _open_local(path)
    except OSError as error:
        raise SourceError(f"{argument} cannot be read ({error.strerror}); check its rights or name another.") from error
    if local is not None:
        return local
    if path.suffix != ".gguf" and (hub_id := _HUB_ID.fullmatch(argument)):
        # Imported here: whoever exports from a disk need not wait for the library.
        from export.sources.hub import NotOnHub, download

        try:
            folder = download(hub_id["id"], hub_id["revision"])
        except NotOnHub as error:
            raise SourceError(f"There is no folder {argument!r} here, and the hub does not help: {error}") from error
        return SafetensorsCheckpoint.open(folder, name=hub_id["id"])
    raise SourceError(
        f"There is nothing at {argument}; name a .gguf file, a folder with config.json and safetensors, or a model on "
        "the hub (organisation/name)."
    )


def _open_local(path: Path) -> Checkpoint | None:
    """What lies on the disk; None: nothing does. Raises SourceError, or OSError for what may not be looked at."""
    if path.is_dir():
        return _open_folder(path)
    return _open_file(path) if path.exists() else None


def _open_file(path: Path) -> Checkpoint:
    if path.suffix in (".json", ".safetensors"):
        raise SourceError(f"{path} is one file of a checkpoint; name the folder that it lies in.")
    if not path.is_file():
        raise SourceError(f"{path} is not a regular file; name a .gguf file or a folder.")
    return GgufCheckpoint.open(path)


def _open_folder(path: Path) -> Checkpoint:
    ggufs = sorted(entry for entry in path.iterdir() if entry.suffix == ".gguf")
    if path.suffix == ".gguf" and not any(path.iterdir()):
        raise SourceError(f"{path} is not a regular file but an empty folder; name a .gguf file.")
    if any((path / name).exists() for name in (SINGLE, INDEX)) or ((path / "config.json").exists() and not ggufs):
        return SafetensorsCheckpoint.open(path)
    if not ggufs:
        raise SourceError(f"{path} has neither config.json nor a .gguf file; name the folder of a checkpoint.")
    if len(ggufs) > 1:
        raise SourceError(f"{path} has {len(ggufs)} GGUF files, such as {ggufs[0].name}; name the one that is meant.")
    return _open_file(ggufs[0])
