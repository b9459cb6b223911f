"""A release against the checkpoint that it was made from: identity, text files, manifest, graph, and every weight.

Weights are read back through the graph's own offsets, a slice at a time, and compared as real numbers with what the
source stands for, each within the bound of its form. Does not know digests of files or how a graph is run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np
from onnx import ModelProto

from core.manifest import MANIFEST_NAME, KvShape, Manifest, release_name
from export import EXPORTER_VERSION
from export.build import QUALITY_FILE, TEMPLATE_FILE, TOKENIZER_FILE, release_digest
from export.checks.report import Check, Verdict
from export.errors import SourceError, TargetError
from export.forms.fidelity import Fidelity, measure
from export.forms.matrix import DenseFloat
from export.graphs.builder import Matrix, Table, Vector
from export.recipes import Dense, Plan, Recipe
from export.release.data import GRAPH_FILE, Drawing
from export.release.places import Place
from export.release.written import WrittenGraph, WrittenMatrix
from export.sources.checkpoint import Checkpoint
from export.sources.digest import SourceDigest
from export.spec import Role, expected_tensors
from export.trial.quality_report import decode_report
from export.trial.trial import NOT_ASKED

_SLICE_WEIGHTS = 1 << 20
"""Weights that are compared at a time: 8 MB in float64, a few times over."""


def check_source(folder: Path, manifest: Manifest, checkpoint: Checkpoint | None) -> Iterator[Check]:
    """Everything that can be said with the checkpoint at hand.

    Raises TargetError for a graph file that is none, SourceError for a checkpoint that cannot be read on.
    """
    if checkpoint is None:
        yield Check(Verdict.SKIPPED, "source", "no --reference was given.")
        return
    yield _identity(manifest, checkpoint)
    yield from _texts(folder, manifest, checkpoint)
    with WrittenGraph(folder / manifest.graph) as written:
        drawing = _drawn(checkpoint, _plan(written.model, manifest))
        yield _fields(manifest, drawing, _notes(written.model))
        yield _claims(folder, manifest, checkpoint)
        difference = _difference(written.model, drawing)
        if difference is None:
            nodes = len(written.model.graph.node)
            yield Check(
                Verdict.OK, f"content of {manifest.graph}", f"{nodes} nodes, as this exporter draws the reference."
            )
        else:
            yield Check(Verdict.BROKEN, f"content of {manifest.graph}", difference + _made_by(manifest))
        for weight in drawing.weights:
            yield _weight(written, drawing, weight)


def _identity(manifest: Manifest, checkpoint: Checkpoint) -> Check:
    with SourceDigest(checkpoint) as digest:
        root = digest.root()
    if root != manifest.source.sha256:
        return Check(
            Verdict.BROKEN,
            "source",
            f"the tensors of {checkpoint.name} have the digest {root[:12]}, the release was made from "
            f"{manifest.source.sha256[:12]} ({manifest.source.name}); name that checkpoint, or export this one.",
        )
    release = release_name(manifest.model, release_digest(root, checkpoint))
    if release != manifest.release:
        return Check(
            Verdict.BROKEN,
            "source",
            f"the tensors of {checkpoint.name} are those of the release, but its sizes, tokenizer or template make it "
            f"{release}; one of the two was changed by hand, or by another version of the exporter.",
        )
    return Check(Verdict.OK, "source", f"{checkpoint.name} is what the release was made from, digest {root[:12]}.")


def _texts(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> Iterator[Check]:
    """The files that are carried over as they are."""
    speech = checkpoint.speech
    template = None if speech.chat_template is None else speech.chat_template.encode()
    for name, expected in ((manifest.tokenizer, speech.tokenizer_json), (manifest.chat_template, template)):
        if name is None:
            continue
        try:
            same = _content(folder / name) == expected
        except TargetError as error:
            yield Check(Verdict.BROKEN, f"content of {name}", error.message)
            continue
        if same:
            yield Check(Verdict.OK, f"content of {name}", "is the reference's.")
        else:
            yield Check(Verdict.BROKEN, f"content of {name}", "is not the reference's; export the model again.")


def _content(path: Path) -> bytes:
    """Of a small file; raises TargetError."""
    if not os.path.isfile(path):
        raise TargetError(f"{path} is not there; export or copy the release again.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise TargetError(f"{path} cannot be read ({error.strerror}); make it readable, or copy it again.") from error


def _plan(model: ModelProto, manifest: Manifest) -> Plan:
    """How the release was made, by the graph's own notes."""
    notes = _notes(model)
    try:
        plan = Plan(Recipe(notes["recipe"]), Dense(notes["dense"]))
    except (KeyError, ValueError) as error:
        raise TargetError(f"The graph does not say by which recipe it was made ({error}); export it again.") from error
    if plan.variant != manifest.variant:
        raise TargetError(f"The graph is of the variant {plan.variant}, the manifest says {manifest.variant}.")
    return plan


def _drawn(checkpoint: Checkpoint, plan: Plan) -> Drawing:
    try:
        return Drawing.of(checkpoint, plan)
    except SourceError as error:
        raise TargetError(f"The graph is of the variant {plan.variant}, not made of this: {error.message}") from error


def _fields(manifest: Manifest, drawing: Drawing, notes: Mapping[str, str]) -> Check:
    """Whatever the manifest says that is known from the checkpoint, the recipe and the graph's own notes.

    Not what was measured, and neither the alias nor the checkpoint's name, which anybody may change.
    """
    for name, expected in _expected(drawing, notes).items():
        found = attrgetter(name)(manifest)
        if found != expected:
            return Check(
                Verdict.BROKEN,
                MANIFEST_NAME,
                f"{name} is {found!r:.80}, {expected!r:.80} by the reference and the graph; export the model again.",
            )
    return Check(Verdict.OK, MANIFEST_NAME, "says what the reference and the graph say.")


def _expected(drawing: Drawing, notes: Mapping[str, str]) -> dict[str, object]:
    """Fields of the manifest, as an export of the checkpoint fills them in."""
    spec, speech, plan = drawing.checkpoint.spec, drawing.checkpoint.speech, drawing.plan
    has_template = speech.chat_template is not None
    return {
        "release": notes.get("release"),
        "exporter_version": notes.get("exporter_version"),
        "source.sha256": notes.get("source_sha256"),
        "source.architecture": drawing.checkpoint.architecture,
        "family": spec.family.value,
        "context_tokens": spec.context_tokens,
        "vocab_size": spec.vocab,
        "tokenizer_size": speech.size,
        "kv": KvShape(spec.layers, spec.kv_heads, spec.head_dim, "float16" if plan.floats == "float16" else "float32"),
        "stop_ids": list(speech.stop_ids),
        "bos_id": speech.bos_id,
        "device": plan.recipe.device.value,
        "operators": drawing.graph.operators(),
        "speech": "chat_template" if has_template else "harmony",
        "graph": GRAPH_FILE,
        "tokenizer": TOKENIZER_FILE,
        "chat_template": TEMPLATE_FILE if has_template else None,
        "quality": QUALITY_FILE,
    }


def _claims(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> Check:
    """Whether the claims are those of an export, and that of the weights is what quality.json comes to."""
    path = folder / QUALITY_FILE
    try:
        report = decode_report(_content(path), str(path))
    except TargetError as error:
        return Check(Verdict.BROKEN, "claims", error.message)
    expected = expected_tensors(checkpoint.spec)
    weights = report.weights_claim({name for name, tensor in expected.items() if tensor.role is Role.EXPERTS})
    if manifest.claims.get("weights") != weights:
        return Check(
            Verdict.BROKEN, "claims", f"what is said of the weights is not what {QUALITY_FILE} says: {weights}."
        )
    if manifest.claims.keys() != {"weights", *NOT_ASKED.claims}:
        return Check(Verdict.BROKEN, "claims", f"{sorted(manifest.claims)!r:.80} are not those of an export.")
    return Check(Verdict.OK, "claims", f"what is said of the weights is what {QUALITY_FILE} says.")


def _notes(model: ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _made_by(manifest: Manifest) -> str:
    if manifest.exporter_version == EXPORTER_VERSION:
        return "."
    return f"; it was made by version {manifest.exporter_version} of the exporter, this is {EXPORTER_VERSION}."


def _difference(model: ModelProto, drawing: Drawing) -> str | None:
    """The first thing in which a graph is not the one that is drawn of the reference."""
    drawn = ModelProto.FromString(drawing.graph_file(_notes(model)))
    if model == drawn:
        return None
    for what in ("node", "initializer", "input", "output"):
        found, expected = getattr(model.graph, what), getattr(drawn.graph, what)
        if len(found) != len(expected):
            return f"has {len(found)} of {what}, not {len(expected)} as this exporter draws the reference"
        for one, other in zip(found, expected, strict=True):
            if one != other:
                return f"the {what} {one.name!r} is not as this exporter draws the reference"
    return "is not what this exporter draws of the reference, though all nodes and initialisers are"


def _weight(written: WrittenGraph, drawing: Drawing, weight: Matrix | Vector | Table) -> Check:
    """One weight as it was written."""
    places = drawing.layout.places[weight.name]
    try:
        match weight:
            case Table(values=values):
                found = written.read(places[0].name, places[0].stored, 0, values.shape)
                same = found.tobytes() == values.tobytes()
                return _table(weight.name, same)
            case Vector():
                return _judged(weight.name, _read_vector(written, drawing, weight, places[0]))
            case Matrix():
                return _judged(weight.name, _read_matrix(written, drawing, weight, places))
    except TargetError as error:
        return Check(Verdict.BROKEN, weight.name, error.message)


def _table(name: str, same: bool) -> Check:
    if same:
        return Check(Verdict.OK, name, "is what the exporter computes.")
    return Check(Verdict.BROKEN, name, "is not what the exporter computes; export the model again.")


def _judged(name: str, found: Fidelity) -> Check:
    if found.broken:
        return Check(
            Verdict.BROKEN,
            name,
            f"{found.broken} of {found.weights} weights are farther from the source than {found.form} promises, "
            f"by up to {found.max_error:.3g}; export the model again.",
        )
    if found.exact:
        return Check(Verdict.OK, name, f"{found.form}: all {found.weights} weights are the source's.")
    return Check(
        Verdict.OK,
        name,
        f"{found.form}: {found.weights} weights within the bound, relative error {found.relative_rms:.2g}, at most "
        f"{found.max_error:.2g}.",
    )


def _read_vector(written: WrittenGraph, drawing: Drawing, vector: Vector, place: Place) -> Fidelity:
    checkpoint, form = drawing.checkpoint, DenseFloat(vector.dtype, exact=vector.dtype == np.float32)
    found: list[Fidelity] = []
    done = 0
    for name in vector.tensors:
        tensor = checkpoint.tensors[name]
        values = checkpoint.read(name, 0, tensor.rows)
        expected = values.to_doubles()
        weights = written.read(place.name, place.stored, done, expected.shape)
        found.append(measure(values, {"weight": weights}, form))
        done += expected.size
    return _sum(found)


def _read_matrix(written: WrittenGraph, drawing: Drawing, matrix: Matrix, places: Sequence[Place]) -> Fidelity:
    """Compare slice by slice, one expert's matrix after the other if there are experts."""
    checkpoint = drawing.checkpoint
    count = max(1, matrix.experts)
    rows = {name: checkpoint.tensors[name].rows // count for name in matrix.tensors}
    columns = checkpoint.tensors[matrix.tensors[0]].columns
    arrays = dict(zip(matrix.form.stored(sum(rows.values()), columns), places, strict=True))
    found: list[Fidelity] = []
    for expert in range(count):
        disk = WrittenMatrix(written, matrix.form, arrays, sum(rows.values()), expert if matrix.experts else None)
        done = 0
        for name in matrix.tensors:
            for start, stop in _slices(rows[name], columns):
                first = expert * rows[name]
                values = checkpoint.read(name, first + start, first + stop)
                found.append(measure(values, disk.read(done + start, done + stop), matrix.form))
            done += rows[name]
    return _sum(found)


def _slices(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, an even number in each but the last: there are arrays that hold two rows in a byte."""
    step = max(2, _SLICE_WEIGHTS // columns & ~1)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _sum(found: Sequence[Fidelity]) -> Fidelity:
    total = found[0]
    for more in found[1:]:
        total += more
    return total
