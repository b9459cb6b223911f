"""The data file of a release: all weights of a graph, from the beginning or from where a killed export ended.

Threads: helpers read, encode and measure slices (`export/release/weights.py`); one hashes and writes
(`export/release/writer.py`); one hashes the source (`export/sources/digest.py`). None runs far ahead of another, so
memory does not grow with the model.
Does not know manifests or who runs the graph.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from core.manifest import Chunk, ReleaseFile
from export import EXPORTER_VERSION
from export.errors import SourceError
from export.forms.fidelity import Fidelity
from export.graphs.builder import GraphBuilder, Matrix, Table, Vector, View
from export.graphs.families import build_graph
from export.progress import Progress
from export.recipes import Plan
from export.release.journal import Entry, Journal, read_journal
from export.release.places import Layout, lay_out
from export.release.weights import WeightWriter
from export.release.writer import PAGE_BYTES, DataFile, Staging, count_intact
from export.sources.checkpoint import Checkpoint
from export.sources.digest import SourceDigest

GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

MOST_HELPERS = 8
"""Each holds a slice and the arrays that it is compared in."""

Written: TypeAlias = Matrix | Vector | Table
"""Weights that have bytes of their own."""


@dataclass(frozen=True)
class Drawing:
    """A checkpoint as a plan stores it: the graph, and the places of its weights."""

    checkpoint: Checkpoint
    plan: Plan
    graph: GraphBuilder
    layout: Layout

    @classmethod
    def of(cls, checkpoint: Checkpoint, plan: Plan) -> Drawing:
        """Raises SourceError for a checkpoint that the recipe is not for, and a tensor that it has no form for."""
        plan.check(checkpoint.spec, {tensor.kind for tensor in checkpoint.tensors.values()})
        graph = build_graph(checkpoint.spec, checkpoint.tensors, plan)
        return cls(checkpoint, plan, graph, lay_out(graph.weights, checkpoint.tensors, PAGE_BYTES))

    @property
    def weights(self) -> list[Written]:
        """In the order of the file."""
        return [weight for weight in self.graph.weights if not isinstance(weight, View)]

    def graph_file(self, properties: dict[str, str]) -> bytes:
        """The graph, which finds its weights in the file of that name beside it."""
        initialisers = self.layout.initialisers(self.graph.weights, DATA_FILE)
        model = self.graph.build(self.checkpoint.spec.family, initialisers, properties)
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    def key(self) -> str:
        """What must be equal for the file's bytes to be equal: the source as far as that can be told without reading
        it, the plan, every place, and this exporter."""
        identity = {
            "exporter": EXPORTER_VERSION,
            "variant": self.plan.variant,
            "spec": asdict(self.checkpoint.spec),
            "source": [[name, *_identity(self.checkpoint, name)] for name in sorted(self.checkpoint.tensors)],
            "places": [
                [place.name, place.offset, place.stored.shape, place.stored.tensor_type]
                for places in self.layout.places.values()
                for place in places
            ],
        }
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


@dataclass(frozen=True)
class Data:
    """The finished file, the digest of the source's tensors, and how near the weights came, by source tensor."""

    file: ReleaseFile
    source_sha256: str
    fidelity: dict[str, Fidelity]


@dataclass(frozen=True)
class Kept:
    """What of a data file need not be written again: its weights, first to last."""

    entries: Sequence[Entry] = ()

    @property
    def chunks(self) -> list[Chunk]:
        """Of the file, from its beginning."""
        return [chunk for entry in self.entries for chunk in entry.chunks]

    @property
    def size_bytes(self) -> int:
        """Where the next weight begins."""
        return sum(chunk.size_bytes for chunk in self.chunks)

    @property
    def sources(self) -> dict[str, str]:
        """Digests of the source tensors that were read."""
        return {name: digest for entry in self.entries for name, digest in entry.sources.items()}

    @property
    def fidelity(self) -> dict[str, Fidelity]:
        """Of the source tensors that were read."""
        return {name: found for entry in self.entries for name, found in entry.fidelity.items()}


def find_kept(drawing: Drawing, staging: Staging, tell: Callable[[str], None]) -> Kept:
    """What a killed export left that this one would write just so; every byte of it is hashed again."""
    entries = read_journal(staging.journal, drawing.key())
    path = staging.release / DATA_FILE
    if entries is None:
        begun = "was begun from another checkpoint, or another way" if staging.journal.exists() else None
        tell(f"the unfinished export {begun}; beginning anew" if begun else "there is no unfinished export to continue")
        return Kept()
    entries = _as_drawn(entries, drawing)
    intact = count_intact(path, Kept(entries).chunks) if path.is_file() else 0
    while intact < len(Kept(entries).chunks):
        entries.pop()
    kept = Kept(entries)
    tell(f"continuing after {len(entries)} of {len(drawing.weights)} weights, {kept.size_bytes / 1e6:.1f} MB")
    return kept


def write_data(drawing: Drawing, staging: Staging, kept: Kept) -> Data:
    """Write all weights but those that are kept.

    Raises SourceError, naming file and tensor, for weights that cannot be carried as planned; OSError for the disk.
    """
    checkpoint, fidelity = drawing.checkpoint, kept.fidelity
    with (
        Progress(drawing.layout.size_bytes, kept.size_bytes) as progress,
        SourceDigest(checkpoint, kept.sources) as digest,
        Journal(staging.journal, drawing.key(), kept.entries, time.monotonic) as journal,
        DataFile(staging.release / DATA_FILE, kept.chunks) as file,
        _helpers() as helpers,
    ):
        writer = WeightWriter(checkpoint, file, helpers, progress.show)
        for weight in drawing.weights[len(kept.entries) :]:
            digest.begin(weight.tensors)
            places = drawing.layout.places[weight.name]
            found = writer.write(weight, places)
            fidelity |= found

            def note(chunks: list[Chunk], weight: Written = weight, found: dict[str, Fidelity] = found) -> None:
                spans = {place.name: place.span for place in drawing.layout.places[weight.name]}
                sources = {tensor: digest.of(tensor) for tensor in weight.tensors}
                journal.append(Entry(weight.name, spans, chunks, sources, found))

            file.when_written(note)
        root = digest.root()
    return Data(file.describe(), root, fidelity)


def write_reference(drawing: Drawing, folder: Path) -> Path:
    """Write a graph and its weights that are not for publishing; returns the graph's path."""
    with DataFile(folder / DATA_FILE) as file, _helpers() as helpers:
        writer = WeightWriter(drawing.checkpoint, file, helpers, lambda name, done_bytes: None)
        for weight in drawing.weights:
            writer.write(weight, drawing.layout.places[weight.name])
    path = folder / GRAPH_FILE
    path.write_bytes(drawing.graph_file({}))
    return path


@contextmanager
def _helpers() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core that this process may use, up to MOST_HELPERS."""
    helpers = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_HELPERS), thread_name_prefix="encode")
    try:
        yield helpers
    finally:
        helpers.shutdown(cancel_futures=True)


def _as_drawn(entries: Sequence[Entry], drawing: Drawing) -> list[Entry]:
    """The first entries that are the first weights, at their places."""
    matching = []
    for entry, weight in zip(entries, drawing.weights, strict=False):
        spans = {place.name: place.span for place in drawing.layout.places[weight.name]}
        if (entry.weight, entry.places) != (weight.name, spans):
            break
        matching.append(entry)
    return matching


def _identity(checkpoint: Checkpoint, name: str) -> list[object]:
    """A tensor's kind, shape and places, and the sizes, times and inodes of the files that it lies in."""
    tensor = checkpoint.tensors[name]
    places = []
    for extent in checkpoint.extents(name):
        try:
            status = extent.path.stat()
        except OSError as error:
            raise SourceError(f"{extent.path} cannot be read any more ({error.strerror}); begin again.") from error
        # Whoever copies a file over another may set its time of modification, but not these two.
        file = [extent.path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        places.append([*file, extent.offset, extent.size_bytes])
    return [tensor.kind, tensor.shape, places]
