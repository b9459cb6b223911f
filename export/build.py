"""One export, start to end: open, plan, write, run, describe, publish.

    checkpoint + recipe -> graph and places of its weights -> is there room? -> data file (export/release/data.py)
      -> graph file, tokenizer, template -> run on this machine, if it can be -> quality, manifest -> swapped in

Does not know block formats, operators, or how a checkpoint's files look.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec

from core.errors import ReleaseError
from core.manifest import (
    FORMAT,
    GRAPH_ABI,
    MANIFEST_NAME,
    KvShape,
    Manifest,
    ReleaseFile,
    Source,
    decode_manifest,
    encode_manifest,
    release_name,
)
from export import EXPORTER_VERSION, hardware
from export.choice import Hardware, choose
from export.recipes import Dense, Plan, Recipe
from export.release.data import DATA_FILE, GRAPH_FILE, Data, Drawing, Kept, find_kept, write_data
from export.release.writer import (
    Staging,
    check_apart,
    check_room,
    check_target,
    clear_leftover,
    matches,
    staged,
    write_file,
)
from export.sources.checkpoint import Checkpoint
from export.sources.digest import SourceDigest
from export.sources.opening import open_checkpoint
from export.spec import Role, expected_tensors
from export.trial.quality_report import QualityReport, TensorQuality, encode_report, totals_of
from export.trial.trial import NOT_ASKED, Trial, draw_reference, try_release

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
QUALITY_FILE = "quality.json"

_BESIDE_WEIGHTS_BYTES = 32_000_000
"""Room for the graph file, the manifest and the like."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What is to be exported.

    source: a GGUF file, a folder, or a model on the hub. recipe None: the one that suits this machine.
    force: even if the release is there already. resume: continue what a killed export left. run: on this machine, to
    measure what the release does.
    """

    source: str
    out: Path
    model: str
    recipe: Recipe | None = None
    dense: Dense = Dense.INT8
    force: bool = False
    resume: bool = False
    run: bool = True


@dataclass(frozen=True)
class Outcome:
    """What lies in the release's folder now; fresh: this export wrote it, else it was there already."""

    manifest: Manifest
    fresh: bool


def export(order: Order, tell: Tell = lambda line: None) -> Outcome:
    """Export one model; `tell` hears what is being done, in clauses for a person.

    A release that is there already, whole and made from the same bytes in the same way, is left as it is.
    Raises SourceError, TargetError, or ReleaseError for a bad model name; then `order.out` is as it was.
    """
    release_name(order.model, "0" * 12)
    named = Path(order.source)
    if os.path.lexists(named):
        check_apart(order.out, [named])
    check_target(order.out)
    checkpoint = open_checkpoint(order.source)
    check_apart(order.out, sorted({extent.path for name in checkpoint.tensors for extent in checkpoint.extents(name)}))
    drawing = Drawing.of(checkpoint, _plan(order, checkpoint, tell))
    present = None if order.force else _already_there(order, drawing)
    if present is not None:
        clear_leftover(order.out)
        return Outcome(present, fresh=False)
    with staged(order.out, keep=order.resume) as staging:
        manifest = _write_release(order, drawing, staging, tell)
    return Outcome(manifest, fresh=True)


def _plan(order: Order, checkpoint: Checkpoint, tell: Tell) -> Plan:
    """The recipe that was asked for, or the one that suits this machine."""
    if order.recipe is not None:
        return Plan(order.recipe, order.dense)
    gpu, memory = hardware.gpu(), hardware.memory()
    machine = Hardware(memory_bytes=memory.total_bytes, cuda_memory_bytes=None)
    if gpu is not None:
        machine = replace(machine, cuda_memory_bytes=gpu.memory_bytes, cuda_capability=gpu.capability)
    recipe, why = choose(checkpoint.spec, checkpoint.tensors, machine, order.dense)
    tell(f"--recipe auto takes {recipe}: {why}")
    return Plan(recipe, order.dense)


def release_digest(source_sha256: str, checkpoint: Checkpoint) -> str:
    """What makes two variants one release: weights, sizes, tokenizer, template, maximum context. Recipes do not
    count."""
    speech = checkpoint.speech
    identity = {
        "source_sha256": source_sha256,
        "spec": asdict(checkpoint.spec),
        "tokenizer_sha256": hashlib.sha256(speech.tokenizer_json).hexdigest(),
        "chat_template": speech.chat_template,
        "stop_ids": speech.stop_ids,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _already_there(order: Order, drawing: Drawing) -> Manifest | None:
    """The manifest in `order.out` if that release is what this export would write, byte by byte intact."""
    path = order.out / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = decode_manifest(path.read_bytes(), str(path))
    except ReleaseError:
        return None  # of another format or damaged: this export replaces it
    wanted = (order.model, drawing.plan.variant, EXPORTER_VERSION)
    lacks_a_run = order.run and manifest.claims.items() >= NOT_ASKED.claims.items()
    if lacks_a_run or wanted != (manifest.model, manifest.variant, manifest.exporter_version):
        return None
    with SourceDigest(drawing.checkpoint) as digest:
        release = release_name(order.model, release_digest(digest.root(), drawing.checkpoint))
    intact = release == manifest.release and all(matches(order.out, file) for file in manifest.files)
    return manifest if intact else None


def _write_release(order: Order, drawing: Drawing, staging: Staging, tell: Tell) -> Manifest:
    """Write, run and describe the release; the manifest comes last."""
    kept = find_kept(drawing, staging, tell) if order.resume else Kept()
    _clear_all_but_data(staging)
    reference = draw_reference(drawing) if order.run else "not asked for"
    check_room(order.out, _needed_bytes(drawing, kept, reference))
    data = write_data(drawing, staging, kept)
    manifest = _describe(order, drawing, data.source_sha256)
    files = [data.file, *_write_small_files(drawing, manifest, staging.release)]
    trial = NOT_ASKED
    if order.run:
        tell("trying the release on this machine")
        trial = try_release(staging.release, manifest, drawing, reference, staging.scratch)
    report = _report(drawing, data, trial)
    files.append(write_file(staging.release, QUALITY_FILE, encode_report(report)))
    manifest = msgspec.structs.replace(
        manifest,
        files=sorted(files, key=lambda file: file.path),
        batch_invariant=trial.batch_invariant,
        golden=trial.golden,
        claims={"weights": report.weights_claim(_experts(drawing.checkpoint)), **trial.claims},
    )
    write_file(staging.release, MANIFEST_NAME, encode_manifest(manifest))
    return manifest


def _clear_all_but_data(staging: Staging) -> None:
    """Remove what a killed export wrote after the weights: it is quickly written again."""
    shutil.rmtree(staging.scratch, ignore_errors=True)
    for leftover in staging.release.iterdir():
        if leftover.name != DATA_FILE:
            leftover.unlink()


def _needed_bytes(drawing: Drawing, kept: Kept, reference: Drawing | str) -> int:
    beside = 0 if isinstance(reference, str) else reference.layout.size_bytes
    beside += len(drawing.checkpoint.speech.tokenizer_json) + _BESIDE_WEIGHTS_BYTES
    return drawing.layout.size_bytes - kept.size_bytes + beside


def _describe(order: Order, drawing: Drawing, source_sha256: str) -> Manifest:
    """All of the manifest that is known before the release is tried."""
    checkpoint, plan = drawing.checkpoint, drawing.plan
    spec, speech = checkpoint.spec, checkpoint.speech
    return Manifest(
        format=FORMAT,
        graph_abi=GRAPH_ABI,
        model=order.model,
        release=release_name(order.model, release_digest(source_sha256, checkpoint)),
        variant=plan.variant,
        family=spec.family,
        exporter_version=EXPORTER_VERSION,
        source=Source(checkpoint.name, source_sha256, checkpoint.architecture),
        context_tokens=spec.context_tokens,
        vocab_size=spec.vocab,
        tokenizer_size=speech.size,
        kv=KvShape(spec.layers, spec.kv_heads, spec.head_dim, "float16" if plan.floats == "float16" else "float32"),
        stop_ids=list(speech.stop_ids),
        bos_id=speech.bos_id,
        batch_invariant=False,
        device=plan.recipe.device.value,
        operators=drawing.graph.operators(),
        speech="harmony" if speech.chat_template is None else "chat_template",
        graph=GRAPH_FILE,
        tokenizer=TOKENIZER_FILE,
        chat_template=None if speech.chat_template is None else TEMPLATE_FILE,
        quality=QUALITY_FILE,
        files=[],
        claims={},
        golden=[],
    )


def _write_small_files(drawing: Drawing, manifest: Manifest, folder: Path) -> list[ReleaseFile]:
    """The graph, the tokenizer and the template."""
    properties = {
        "recipe": drawing.plan.recipe.value,
        "dense": drawing.plan.dense.value,
        "release": manifest.release,
        "source_sha256": manifest.source.sha256,
        "exporter_version": manifest.exporter_version,
        "graph_abi": str(manifest.graph_abi),
    }
    speech = drawing.checkpoint.speech
    files = [
        write_file(folder, GRAPH_FILE, drawing.graph_file(properties)),
        write_file(folder, TOKENIZER_FILE, speech.tokenizer_json),
    ]
    if speech.chat_template is not None:
        files.append(write_file(folder, TEMPLATE_FILE, speech.chat_template.encode()))
    return files


def _experts(checkpoint: Checkpoint) -> set[str]:
    """Names of the tensors that are experts' weights."""
    expected = expected_tensors(checkpoint.spec)
    return {name for name, tensor in expected.items() if tensor.role is Role.EXPERTS}


def _report(drawing: Drawing, data: Data, trial: Trial) -> QualityReport:
    tensors = {name: TensorQuality.of(found) for name, found in data.fidelity.items()}
    return QualityReport(totals_of(data.file.size_bytes, drawing.checkpoint.tensors), trial.quality, tensors)
