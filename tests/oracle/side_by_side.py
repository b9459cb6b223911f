"""`make bench-exporters`: other exporters and ours on the same checkpoints. Writes docs/benchmarks/exporters.md.

Each export is a whole process: its seconds, its peak memory, what it wrote, and what it made of the experts' values.
Needs the environments of `make oracle` and `make genai`, 16 GB of memory for onnxruntime-genai's builder, and 15 GB of
disk under SCRATCH. Takes about twenty minutes on two cores.
"""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import PIPE

import onnx

from core.manifest import MANIFEST_NAME, decode_manifest
from tests.bench.export import SCRATCH, Run, checkpoint, measured, size_of, tell
from tests.bench.report import ROOT, provenance, publish
from tests.oracle.environments import interpreter
from tests.oracle.experts import Change, change_of_experts
from tests.tools.gpt_oss_checkpoint import FULL, TINY, write_checkpoint

EXPERTS = range(0, FULL.experts, 4)
"""Whose values are compared; the others went the same way."""

MIB = 1 << 20


@dataclass(frozen=True)
class Exporter:
    """A name for the page, and the words that come before and after the checkpoint and the target."""

    name: str
    command: tuple[str, ...]

    def export(self, source: Path, out: Path) -> list[str]:
        """The command line."""
        values = {"source": str(source), "out": str(out)}
        return [word.format(**values) for word in self.command]


@dataclass(frozen=True)
class Result:
    """One row."""

    source: str
    exporter: str
    run: Run
    size_bytes: int
    nodes: int
    change: Change | None

    def row(self) -> str:
        change = f"{self.change.changed:.0%} | {self.change.relative:.1%}" if self.change else "- | -"
        peak_gb, size_gb = self.run.peak_mib * MIB / 1e9, self.size_bytes / 1e9
        return (
            f"| {self.source} | {self.exporter} | {self.run.seconds:.0f} | {peak_gb:.2f} | {size_gb:.3f} | "
            f"{self.nodes:,} | {change} |"
        )


def ours(recipe: str) -> Exporter:
    """`python -m export`."""
    words = (sys.executable, "-m", "export", "{source}", "--recipe", recipe, "--out", "{out}", "--no-run")
    return Exporter(f"ours, {recipe}", words)


def optimum() -> Exporter:
    """`optimum-cli export onnx`."""
    words = (str(interpreter("oracle").with_name("optimum-cli")), "export", "onnx", "--model", "{source}")
    return Exporter("optimum, fp32", (*words, "--task", "text-generation-with-past", "{out}"))


def genai(device: str, *options: str) -> Exporter:
    """onnxruntime-genai's builder, 4 bits where the options do not say otherwise."""
    builder = (str(interpreter("genai")), "-m", "onnxruntime_genai.models.builder", "-i", "{source}", "-o", "{out}")
    target = ("-p", "int4", "-e", device, "-c", str(SCRATCH / "genai-cache"))
    extra = ("--extra_options", *options) if options else ()
    return Exporter(", ".join(["onnxruntime-genai int4", device, *options]), (*builder, *target, *extra))


def compare(source: Path, name: str, exporters: list[Exporter], *, experts: bool = False) -> Iterator[Result]:
    """Export a checkpoint with each; what they write is given back at once."""
    for exporter in exporters:
        out = SCRATCH / "side-by-side"
        shutil.rmtree(out, ignore_errors=True)
        run = measured(["env", "HF_HUB_OFFLINE=1", *exporter.export(source, out)])
        # In another process: what starts a child hands it its own peak of memory, so this one must stay small.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            nodes, change = apart.submit(look_at, graph_of(out), source if experts else None).result()
        result = Result(name, exporter.name, run, size_of(out), nodes, change)
        tell(result.row())
        shutil.rmtree(out)
        yield result


def graph_of(folder: Path) -> Path:
    """The graph in what an exporter wrote: ours says, the others call it model.onnx."""
    manifest = folder / MANIFEST_NAME
    if manifest.is_file():
        return folder / decode_manifest(manifest.read_bytes(), str(manifest)).graph
    return folder / "model.onnx"


def look_at(graph: Path, source: Path | None) -> tuple[int, Change | None]:
    """How many operators run, and what became of the experts of `source`, if it has any."""
    nodes = len(onnx.load(graph, load_external_data=False).graph.node)
    return nodes, change_of_experts(source, graph, EXPERTS) if source else None


def smollm2() -> Path:
    """The small real model as a Hugging Face folder in fp32, written by the oracle's transformers."""
    folder = SCRATCH / "smollm2"
    if not (folder / "optimum.npy").is_file():
        gguf = subprocess.run(
            [sys.executable, "scripts/get-model"], cwd=ROOT, check=True, stdout=PIPE, text=True
        ).stdout
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ids.json").write_text("[1]")
        script = str(Path(__file__).with_name("optimum_logits.py"))
        ids, out = str(folder / "ids.json"), str(folder)
        measured([str(interpreter("oracle")), script, gguf.strip(), "--ids", ids, "--out", out])
    return folder / "checkpoint"


def page(results: list[Result]) -> list[str]:
    """docs/benchmarks/exporters.md."""
    return [
        "# Other exporters and ours",
        "",
        "Written by `make bench-exporters`; docs/decisions/013 says what follows from it.",
        "",
        f"- {provenance('onnx')}",
        "",
        "| checkpoint | exporter | seconds | peak RSS, GB | written, GB | nodes | expert values changed | error |",
        "|---|---|---|---|---|---|---|---|",
        *(result.row() for result in results),
    ]


def main() -> int:
    """Everything, smallest first."""
    tiny = write_checkpoint(SCRATCH / "gpt-oss-tiny", TINY)
    results = [
        *compare(tiny, "gpt_oss, tiny", [optimum(), ours("fp32")]),
        *compare(smollm2(), "SmolLM2-135M", [optimum(), ours("fp32"), genai("cpu"), ours("cpu-int8")]),
        *compare(
            checkpoint(replace(FULL, layers=2)),
            "gpt_oss, 2 of 24 layers",
            [
                genai("cpu"),
                ours("cpu-int4"),
                ours("cpu-int8"),
                genai("cuda", "moe_quant_type=mxfp4"),
                ours("cuda-fp4"),
                ours("cpu-mxfp4"),
            ],
            experts=True,
        ),
    ]
    publish("exporters.md", page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
