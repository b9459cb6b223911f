"""llama.cpp on the same GGUF and onnxruntime-genai on its own builder's graph of the same weights, beside ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

from core.manifest import Manifest
from edge_node.engine.engine import EngineLimits
from edge_node.engine.speech import Speech
from edge_node.runtime.runner import Runner
from tests.bench.bare_loop import SLOTS, open_runner, read_manifest
from tests.bench.engine.loops import (
    GREEDY,
    EngineLoop,
    all_writing,
    endless,
    in_turn,
    request,
    speech_of,
    story,
    time_to_first,
)
from tests.bench.engine.rows import KEPT, Found, Scale, ratios, row, tell
from tests.bench.engine.served import served
from tests.bench.report import ROOT, THREADS
from tests.oracle.environments import interpreter, offline
from tests.oracle.side_by_side import genai, smollm2

RIVALS = Path(__file__).parent / "rivals"
CONTEXT_TOKENS = 1024
PREFILL_TOKENS = 512
PROMPT_TOKENS = 64
LOADS = ("prefill of 512, tokens/s", "1 stream, tokens/s", f"{SLOTS} streams, tokens/s")


class Ours:
    """The engine in this process, greedy, without speculation and without a prefix store."""

    def __init__(self, folder: Path) -> None:
        self._manifest: Manifest = read_manifest(folder)
        self._speech: Speech = speech_of(folder, self._manifest)
        self._runner: Runner = open_runner(folder, THREADS, SLOTS, CONTEXT_TOKENS)

    def loads(self, tokens: int) -> list[float]:
        """Tokens per second, in the order of LOADS."""
        return [self._prefill(), self._decode(1, tokens), self._decode(SLOTS, tokens)]

    def _loop(self) -> EngineLoop:
        limits = EngineLimits(slots=SLOTS, context_tokens=CONTEXT_TOKENS, max_waiting=0)
        return EngineLoop(self._runner, self._manifest, self._speech, limits)

    def _prefill(self) -> float:
        asked = request(self._manifest, "p", "river stone bread cloud " * (PREFILL_TOKENS // 4 - 9), 1, GREEDY)
        length = len(self._speech.lay_out(asked.items, self._manifest.release).ids)
        return length / time_to_first(self._loop(), asked)

    def _decode(self, streams: int, tokens: int) -> float:
        loop = self._loop()
        answers = [loop.submit(request(self._manifest, str(i), story(i), 900, GREEDY)) for i in range(streams)]
        loop.until(all_writing(answers))
        return streams * tokens / sum(in_turn(tokens, loop.step)[0])


def measure(scale: Scale) -> Found:
    """Rounds in turn; whoever is not measured is idle."""
    tokens = scale(96, 16)
    ours = Ours(endless())
    names = ("llama.cpp", "onnxruntime-genai")
    found: dict[str, list[list[float]]] = {name: [] for name in ("ours", *names)}
    with served(*llamacpp_command()) as llamacpp, served(*genai_command()) as other:
        ours.loads(4)
        for number in range(scale(4, 1)):
            tell(f"round {number + 1}")
            found["ours"].append(ours.loads(tokens))
            for name, rival in zip(names, (llamacpp, other), strict=True):
                found[name].append(loads(rival.ask, tokens))
    rows = []
    for at, load in enumerate(LOADS):
        columns = {name: [each[at] for each in rounds] for name, rounds in found.items()}
        rows += [row(f"{load}: {name}", values, "tokens/s") for name, values in columns.items()]
        rows += [
            row(f"{load}: ours over {name}", ratios(columns["ours"], columns[name]), "x", digits=2) for name in names
        ]
    notes = [
        f"SmolLM2-135M, greedy, {THREADS} threads each, whoever is not measured is idle. Ours: the engine's loop over "
        "the graph that carries the GGUF's codes. llama.cpp: `xllamacpp`'s prebuilt server on that GGUF. "
        "onnxruntime-genai: its builder's int4, a static batch; 4-bit codes of its own, less exact (decision 013)."
    ]
    return Found("neighbours", "llama.cpp and onnxruntime-genai beside ours", rows, notes)


def loads(ask: Any, tokens: int) -> list[float]:
    """A rival's tokens per second, in the order of LOADS."""
    prefill = ask(streams=1, tokens=2, prompt_tokens=PREFILL_TOKENS)["prefill_tokens_s"]
    decode = [ask(streams=n, tokens=tokens, prompt_tokens=PROMPT_TOKENS)["decode_tokens_s"] for n in (1, SLOTS)]
    return [prefill, *decode]


def llamacpp_command() -> list[str]:
    """The same GGUF that our release was exported from."""
    get_model = [sys.executable, "scripts/get-model"]
    gguf = subprocess.run(get_model, cwd=ROOT, check=True, stdout=PIPE, text=True).stdout.strip()
    return [str(interpreter("llamacpp")), str(RIVALS / "llamacpp.py"), gguf, "--threads", str(THREADS)]


def genai_command() -> list[str]:
    """Its builder's graph, built once."""
    folder = KEPT / "smollm2-genai"
    if not (folder / "genai_config.json").is_file():
        tell("building onnxruntime-genai's graph")
        command = genai("cpu").export(smollm2(), folder)
        subprocess.run(command, cwd=ROOT, env=offline(), check=True, capture_output=True)
    return [str(interpreter("genai")), str(RIVALS / "genai.py"), str(folder), "--threads", str(THREADS)]
