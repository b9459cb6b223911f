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
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:
        raise SourceError(f"{argument} cannot be looked at ({error.strerror}); name another place.") from error
    if is_folder:
        return _open_folder(path)
    if is_there:
        return _open_file(path)
    if path.suffix != ".gguf" and (hub_id := _HUB_ID.fullmatch(argument)):
        # Imported here: whoever exports from a disk need not wait for the library.
        from export.sources.hub import download

        return SafetensorsCheckpoint.open(download(hub_id["id"], hub_id["revision"]), name=hub_id["id"])
    raise SourceError(
        f"There is nothing at {argument}; name a .gguf file, a folder with config.json and safetensors, or a model on "
        "the hub (organisation/name)."
    )


def _open_file(path: Path) -> Checkpoint:
    if path.suffix in (".json", ".safetensors"):
        raise SourceError(f"{path} is one file of a checkpoint; name the folder that it lies in.")
    return GgufCheckpoint.open(path)


def _open_folder(path: Path) -> Checkpoint:
    ggufs = sorted(path.glob("*.gguf"))
    if any((path / name).exists() for name in (SINGLE, INDEX)) or ((path / "config.json").exists() and not ggufs):
        return SafetensorsCheckpoint.open(path)
    if not ggufs:
        raise SourceError(f"{path} has neither config.json nor a .gguf file; name the folder of a checkpoint.")
    if len(ggufs) > 1:
        raise SourceError(f"{path} has {len(ggufs)} GGUF files, such as {ggufs[0].name}; name the one that is meant.")
    return GgufCheckpoint.open(ggufs[0])
