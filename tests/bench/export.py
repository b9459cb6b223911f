"""`make bench-export`: what the exporter costs at GPT-OSS-20B's full shape. Writes docs/benchmarks/export.md.

    copy        the checkpoint read, hashed and written once more: what any exporter pays at least
    recipes     `python -m export` of a synthetic checkpoint of the full shape, each in a process of its own
    generate    the cpu-int4 release loaded whole, and the cpu-int8 one of two layers: seconds, memory, tokens/s

Copy and `cpu-mxfp4` alternate, since a shared machine's disk has moods. Needs about 45 GB under SCRATCH (default
.cache/bench-export), all of it given back; KEEP=1 leaves the checkpoint for the next run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from core.manifest import MANIFEST_NAME, Manifest, decode_manifest
from export.recipes import Recipe
from tests.bench.report import ROOT, THREADS, provenance, publish
from tests.tools.gpt_oss_checkpoint import FULL, GptOssShape, write_checkpoint

SCRATCH = Path(os.environ.get("SCRATCH", ROOT / ".cache/bench-export"))
PIECE_BYTES = 8 * 1024 * 1024
ROUNDS = 2
RECIPES = (Recipe.CUDA_FP4, Recipe.CUDA_INT8, Recipe.CUDA_INT4, Recipe.CPU_INT8, Recipe.CPU_INT4)
SERVED_LAYERS = 2
"""Layers of the cpu-int8 release that is run: whole, it needs more memory than the machine it is measured on."""


@dataclass(frozen=True)
class Run:
    """One process: wall seconds and the most memory it held."""

    seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Exported:
    """A recipe's cost and result."""

    recipe: Recipe
    run: Run
    size_bytes: int
    fp32_bytes: int


def measured(command: list[str], log: Path | None = None) -> Run:
    """Run a command to its end; its output goes to `log`. Raises SystemExit if it fails."""
    started = time.monotonic()
    with (log or Path(os.devnull)).open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"bench: `{' '.join(command)}` failed; run it to see why.")
    return Run(time.monotonic() - started, used.ru_maxrss / 1024)


def tell(line: str) -> None:
    """Progress: the whole takes the better part of an hour."""
    print(line, file=sys.stderr, flush=True)


def checkpoint(shape: GptOssShape) -> Path:
    """The synthetic checkpoint, written unless it is there."""
    folder = SCRATCH / f"gpt-oss-{shape.layers}"
    if not (folder / "model.safetensors.index.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        tell(f"writing a checkpoint of {shape.layers} layers")
        write_checkpoint(folder, shape, tokenizer="tiny")
    return folder


def copy(source: Path, target: Path) -> None:
    """Read, hash and write every file of a folder, in one thread and in pieces."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            while piece := reader.read(PIECE_BYTES):
                digest.update(piece)
                writer.write(piece)
            writer.flush()
            os.fsync(writer.fileno())


def measure_copy(source: Path) -> Run:
    """One copy, given back at once."""
    target = SCRATCH / "copy"
    shutil.rmtree(target, ignore_errors=True)
    run = measured([sys.executable, "-m", "tests.bench.export", "--copy", str(source), str(target)])
    shutil.rmtree(target)
    return run


def measure_export(source: Path, recipe: Recipe, keep: bool = False) -> Exported:
    """One export, given back at once unless it is wanted."""
    out = SCRATCH / f"{source.name}-{recipe}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "export", str(source), "--recipe", recipe, "--out", str(out), "--no-run"]
    run = measured(command)
    manifest = manifest_of(out)
    assert manifest.quality is not None
    totals = json.loads((out / manifest.quality).read_text())["totals"]
    tell(f"{source.name} {recipe}: {run.seconds:.0f} s, peak {run.peak_mib:.0f} MiB")
    if not keep:
        shutil.rmtree(out)
    return Exported(recipe, run, totals["bytes"], totals["fp32_bytes"])


def manifest_of(release: Path) -> Manifest:
    """What a release says about itself."""
    return decode_manifest((release / MANIFEST_NAME).read_bytes(), str(release))


def generate(release: Path) -> dict[str, float]:
    """Load a release and write sixteen tokens, as the node does; printed by the child process."""
    import resource

    from edge_node.engine.step import Chunk, Decode, StepPlan
    from edge_node.runtime.runner import Runner

    began = time.monotonic()
    runner = Runner.open(release, manifest_of(release), "cpu", THREADS, 1, 256)
    loaded_s = time.monotonic() - began
    prompt = list(range(100, 164))
    runner.run(StepPlan(0, Chunk(0, 0, prompt, []), None, 0.0))  # pages the weights in
    read = runner.run(StepPlan(0, Chunk(0, 0, prompt, [len(prompt) - 1]), None, 0.0))
    assert read.chunk_logits is not None
    ids, steps = [int(read.chunk_logits.argmax())], []
    for position in range(len(prompt), len(prompt) + 16):
        step = runner.run(StepPlan(0, None, Decode(0, ids[-1:], [position + 1], [0]), 0.0))
        assert step.decode_logits is not None
        ids.append(int(step.decode_logits[0].argmax()))
        steps.append(step.decode_s)
    return {
        "loaded_s": loaded_s,
        "prefill_tokens_s": len(prompt) / read.chunk_s,
        "decode_tokens_s": 1 / statistics.median(steps),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "distinct_ids": len(set(ids)),
    }


def measure_generate(release: Path) -> dict[str, float]:
    """`generate` in a process of its own, whose memory is its own."""
    command = [sys.executable, "-m", "tests.bench.export", "--generate", str(release)]
    printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    numbers: dict[str, float] = json.loads(printed)
    tell(f"{release.name}: {numbers}")
    return numbers


def page(
    source_bytes: int,
    copies: list[Run],
    mxfp4: list[Exported],
    others: list[Exported],
    generated: dict[str, dict[str, float]],
) -> list[str]:
    """docs/benchmarks/export.md."""
    ratios = [export.run.seconds / copied.seconds for export, copied in zip(mxfp4, copies, strict=True)]
    copy_s = statistics.median(run.seconds for run in copies)
    rows = [
        f"| copy with sha256 | {copy_s:.0f} | {source_bytes / 1e9 / copy_s:.2f} | - | {source_bytes / 1e9:.2f} | - |"
    ]
    for export in [*mxfp4[-1:], *others]:
        seconds = statistics.median(e.run.seconds for e in mxfp4) if export in mxfp4 else export.run.seconds
        rows.append(
            f"| {export.recipe} | {seconds:.0f} | {source_bytes / 1e9 / seconds:.2f} | {export.run.peak_mib:.0f} | "
            f"{export.size_bytes / 1e9:.2f} | {export.fp32_bytes / export.size_bytes:.1f} |"
        )
    return [
        "# Exporting GPT-OSS-20B",
        "",
        "Written by `make bench-export`: a synthetic checkpoint of the full real shape (24 layers, random MXFP4).",
        "",
        f"- {provenance('onnx', 'numpy', 'onnxruntime')}",
        f"- checkpoint {source_bytes / 1e9:.2f} GB; GB/s are of the checkpoint; the model in float32 would be "
        f"{mxfp4[0].fp32_bytes / 1e9:.1f} GB",
        f"- cpu-mxfp4 over copying the same bytes with sha256, run by run in turn: "
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} (target: 2)",
        "",
        "| | seconds | GB/s | peak RSS, MiB | release, GB | times smaller than float32 |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "Loaded and run by the node's runner (2 threads, 64 tokens read, 16 written greedily):",
        "",
        "| release | loaded, s | prefill, tokens/s | decode, tokens/s | peak RSS, GiB | distinct ids |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {run['loaded_s']:.0f} | {run['prefill_tokens_s']:.1f} | {run['decode_tokens_s']:.2f} | "
            f"{run['peak_gib']:.1f} | {run['distinct_ids']:.0f} |"
            for name, run in generated.items()
        ),
    ]


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> int:
    """Everything; about forty minutes on two cores."""
    options = _options()
    if options.copy:
        copy(*options.copy)
        return 0
    if options.generate:
        print(json.dumps(generate(options.generate)))
        return 0
    full = checkpoint(replace(FULL, layers=options.layers))
    copies, mxfp4 = [], []
    for _ in range(ROUNDS):
        copies.append(measure_copy(full))
        tell(f"copy: {copies[-1].seconds:.0f} s")
        mxfp4.append(measure_export(full, Recipe.CPU_MXFP4))
    others = [measure_export(full, recipe, keep=recipe is Recipe.CPU_INT4) for recipe in RECIPES]
    generated = {}
    int4 = SCRATCH / f"{full.name}-{Recipe.CPU_INT4}"
    generated[f"cpu-int4, {options.layers} layers"] = measure_generate(int4)
    shutil.rmtree(int4)
    few = checkpoint(replace(FULL, layers=SERVED_LAYERS))
    measure_export(few, Recipe.CPU_INT8, keep=True)
    int8 = SCRATCH / f"{few.name}-{Recipe.CPU_INT8}"
    generated[f"cpu-int8, {SERVED_LAYERS} layers"] = measure_generate(int8)
    shutil.rmtree(int8)
    publish("export.md", page(size_of(full), copies, mxfp4, others, generated))
    if not os.environ.get("KEEP"):
        shutil.rmtree(SCRATCH)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the exporter at full size.")
    parser.add_argument("--layers", type=int, default=FULL.layers)
    parser.add_argument("--copy", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
