"""Checks of a release that lies on a disk, from its files alone, and against the checkpoint that it was made from.

    files       the manifest can be read, every chunk has its digest, nothing else lies there
    golden      the release continues the manifest's prompts as the manifest says
    source      the reference is the very checkpoint; its graph is this one; every weight is in the bound of its form
    logits      against transformers, where it is installed and the model is small

Does not know how a graph is run or how weights are compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from core.errors import ReleaseError
from core.manifest import MANIFEST_NAME, Manifest, ReleaseFile, decode_manifest
from export.checks.logits import check_logits
from export.checks.report import Check, Report, Verdict
from export.checks.source import check_source
from export.errors import TargetError
from export.release.writer import count_intact
from export.sources.checkpoint import Checkpoint
from export.sources.opening import open_checkpoint

_WHOLE = ("source", MANIFEST_NAME)
"""What must be right if two models are to be compared position by position."""


def verify(folder: Path, reference: str | None = None, seen: Callable[[Check], None] = lambda check: None) -> Report:
    """Check the release in `folder`; `seen` hears of each check when it is made.

    reference: the checkpoint, as `open_checkpoint` takes it. Raises SourceError if that cannot be read, and TargetError
    if there is no release in `folder`; whatever is wrong with the release itself stands in the report.
    """
    path = folder / MANIFEST_NAME
    if not os.path.isfile(path):
        raise TargetError(f"There is no {MANIFEST_NAME} in {folder}; name the folder of a release.")
    checkpoint = None if reference is None else open_checkpoint(reference)
    try:
        manifest = decode_manifest(path.read_bytes(), str(path))
    except (ReleaseError, OSError) as error:
        fault = error.message if isinstance(error, ReleaseError) else _unreadable(error)
        check = Check(Verdict.BROKEN, MANIFEST_NAME, fault)
        seen(check)
        return Report(folder.name, "unknown", [check])
    checks = []
    for check in _checks(folder, manifest, checkpoint):
        seen(check)
        checks.append(check)
    return Report(manifest.release, manifest.variant, checks)


def _checks(folder: Path, manifest: Manifest, checkpoint: Checkpoint | None) -> Iterator[Check]:
    files = list(check_files(folder, manifest))
    yield from files
    is_the_reference_s = True
    for check in _or_broken("source", check_source(folder, manifest, checkpoint)):
        is_the_reference_s &= check.verdict is not Verdict.BROKEN or check.subject not in _WHOLE
        yield check
    runs = _why_not_run(files)
    if runs is not None:
        yield Check(Verdict.SKIPPED, "golden prompts", runs)
        yield Check(Verdict.SKIPPED, "logits", runs)
        return
    yield from _or_broken("golden prompts", check_golden(folder, manifest))
    if is_the_reference_s:
        yield from _or_broken("logits", check_logits(folder, manifest, checkpoint))
    else:
        yield Check(Verdict.SKIPPED, "logits", "the reference is of another model, or the manifest says so.")


def _why_not_run(files: list[Check]) -> str | None:
    if any(check.verdict is Verdict.BROKEN for check in files):
        return "a release with broken files is not run."
    if find_spec("onnxruntime") is None:
        return "onnxruntime is not installed; pip install 'edgechat[edge-cpu]'."
    return None


def _or_broken(subject: str, checks: Iterator[Check]) -> Iterator[Check]:
    """The checks, and another that is broken where they could not go on."""
    try:
        yield from checks
    except TargetError as error:
        yield Check(Verdict.BROKEN, subject, error.message)


def check_files(folder: Path, manifest: Manifest) -> Iterator[Check]:
    """Every listed file by its chunks, and whether there are others."""
    for file in manifest.files:
        try:
            fault = _fault(folder / file.path, file)
        except OSError as error:
            fault = _unreadable(error)
        size = f"as listed: {file.size_bytes:,} bytes, chunks: {len(file.chunks)}."
        yield Check(Verdict.BROKEN, file.path, fault) if fault else Check(Verdict.OK, file.path, size)
    listed = {MANIFEST_NAME, *(file.path for file in manifest.files)}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not os.path.isdir(path)}
    if stray := sorted(found - listed):
        others = f"{stray[0]!r} and {len(stray) - 1} others" if len(stray) > 1 else repr(stray[0])
        yield Check(Verdict.BROKEN, "other files", f"{others} in the folder, which the manifest does not list.")
    else:
        yield Check(Verdict.OK, "other files", "none.")


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror}); make it readable, or export or copy the release again."


def _fault(path: Path, listed: ReleaseFile) -> str | None:
    """What is wrong with a file, if anything is."""
    if not path.is_file():
        return "is missing; export or copy the release again."
    size_bytes = path.stat().st_size
    if size_bytes != listed.size_bytes:
        return f"has {size_bytes} bytes, {listed.size_bytes} are listed; export or copy the release again."
    intact = count_intact(path, listed.chunks)
    if intact == len(listed.chunks):
        return None
    start = sum(chunk.size_bytes for chunk in listed.chunks[:intact])
    end = start + listed.chunks[intact].size_bytes
    return f"bytes {start} to {end} are not those that are listed; export or copy the release again."


def check_golden(folder: Path, manifest: Manifest) -> Iterator[Check]:
    """Whether this machine continues the prompts as the one that exported; raises TargetError for a wrong graph."""
    # Imported here: whoever has no runtime can check all but this.
    from export.trial.golden import EPSILON
    from export.trial.run import CannotRun, retrace_all

    if not manifest.golden:
        yield Check(Verdict.SKIPPED, "golden prompts", "the manifest has none: the exporting machine did not run it.")
        return
    found = retrace_all(folder, manifest)
    if isinstance(found, CannotRun):
        yield Check(Verdict.SKIPPED, "golden prompts", found.reason)
        return
    for number, (golden, again) in enumerate(zip(manifest.golden, found, strict=True), 1):
        subject = f"golden prompt {number}"
        if again.is_reproduced:
            yield Check(Verdict.OK, subject, f"{len(golden.ids)} ids reproduced.")
            continue
        differs = f"id {again.first_difference} is not the best here, and one misses the best by {again.gap:.3g} logits"
        if again.is_explained:
            yield Check(Verdict.OK, subject, f"{differs}: less than {EPSILON:g}, as on another processor.")
        else:
            yield Check(Verdict.BROKEN, subject, f"{differs}; another graph, or another machine's fault, made them.")
