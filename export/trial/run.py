"""Runs a written graph on this machine's processor and says what came of it. The only module that imports onnxruntime.

`measure` is for a release that is being written, `retrace_all` and `compare` are for one that was. Each works in a
process of its own (`export/trial/child.py`): ONNX Runtime does not return memory, and leaves its thread rounding
denormals to zero. Does not know sources, recipes or what is done with the answers.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from core.manifest import Golden, KvShape, Manifest
from export import hardware
from export.errors import SourceError, TargetError
from export.forms.values import Floats
from export.trial import child
from export.trial.golden import IDS, LENGTHS, Retraced, continue_greedily, prompts, retrace
from export.trial.invariance import UNIT_TOKENS, Ids, Invariance, measure_invariance, trial_tokens
from export.trial.quality import Part, Quality, Score, score

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is loaded
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

TEXT = Path(__file__).with_name("passage.txt")
TEXT_TOKENS = 1024
"""The text that quality is measured on, and how much of it."""

PROVIDER = "CPUExecutionProvider"
_MOST_AT_ONCE = 64  # positions whose logits are held at a time: 51 MB for a vocabulary of 200,000
# Weights are laid out anew when they are loaded, and pages of the files dropped: they take their size once. Then
# there are the library, the cache and activations.
_BESIDE_WEIGHTS_BYTES = 500_000_000

Result = TypeVar("Result")


@dataclass(frozen=True)
class CannotRun:
    """The release may be sound, but this machine cannot run it. reason: a sentence."""

    reason: str


@dataclass(frozen=True)
class Reference:
    """What a release is compared with: the graph file of the same model in float32, and what reports call it.

    graph None: there is none, and `label` says why.
    """

    label: str
    graph: Path | None


@dataclass(frozen=True)
class Ran:
    """What a release does on this machine."""

    invariance: Invariance
    golden: tuple[Golden, ...]
    quality: Quality


def measure(folder: Path, manifest: Manifest, window_tokens: int, reference: Reference) -> Ran | CannotRun:
    """Run a release: what is invariant, what it continues golden prompts with, how well it predicts a text.

    manifest: as far as it is known; `files`, `claims`, `golden`, `quality` and `batch_invariant` are not looked at.
    window_tokens: the longest attention window, 0 if there is none. The reference's logits lie in a file beside its
    graph meanwhile. Raises TargetError if the graph is wrong, SourceError if the context is too short for a release.
    """
    if manifest.context_tokens < UNIT_TOKENS:
        raise SourceError(
            f"The model has a context of {manifest.context_tokens} tokens; a release needs at least {UNIT_TOKENS}."
        )
    if obstacle := _obstacle(folder, manifest):
        return CannotRun(obstacle)
    text = text_ids(folder, manifest)
    if reference.graph is None:
        return _in_child(_measure, folder, manifest, window_tokens, text, None, reference.label)
    expected = reference.graph.with_suffix(".logits.npy")
    try:
        written = _written_logits(reference.graph, text, expected)
        if isinstance(written, CannotRun):
            label = f"none, the float32 form cannot run here: {written.reason}"
            return _in_child(_measure, folder, manifest, window_tokens, text, None, label)
        return _in_child(_measure, folder, manifest, window_tokens, text, expected, reference.label)
    finally:
        expected.unlink(missing_ok=True)


def _written_logits(graph: Path, text: list[int], target: Path) -> CannotRun | None:
    if obstacle := _shortage(graph.parent):
        return CannotRun(obstacle)
    return _in_child(_write_logits, graph, text, target)


def retrace_all(folder: Path, manifest: Manifest) -> list[Retraced] | CannotRun:
    """Walk along every golden prompt of a release; raises TargetError if the graph is wrong."""
    if obstacle := _obstacle(folder, manifest):
        return CannotRun(obstacle)
    return _in_child(_retrace_all, folder, manifest)


def compare(folder: Path, manifest: Manifest, ids: list[int], expected: Path) -> Score | CannotRun:
    """Compare a release's logits with a file of others: float32 .npy [len(ids) - 1, at least tokenizer_size].

    Raises TargetError if the graph is wrong.
    """
    if obstacle := _obstacle(folder, manifest):
        return CannotRun(obstacle)
    return _in_child(_compare, folder, manifest, ids, expected)


def text_ids(folder: Path, manifest: Manifest) -> list[int]:
    """The ids of the text that quality is measured on, as the release's tokenizer cuts it.

    Raises TargetError for a tokenizer that makes nothing of it, or ids that the manifest does not know.
    """
    ids = _encoder(folder, manifest)(TEXT.read_text(encoding="utf-8"))
    if len(ids) < 3:
        raise TargetError(f"{folder / manifest.tokenizer} makes no ids of English prose; export the model again.")
    if max(ids) >= manifest.tokenizer_size:
        raise TargetError(
            f"{folder / manifest.tokenizer} makes the id {max(ids)} of English prose, the manifest knows "
            f"{manifest.tokenizer_size} ids; export the model again."
        )
    return ids[: min(TEXT_TOKENS, manifest.context_tokens) + 1]


def _encoder(folder: Path, manifest: Manifest) -> Callable[[str], list[int]]:
    """A release's tokenizer, which adds nothing to a text; it raises TargetError for a file that cuts no text."""
    path = folder / manifest.tokenizer
    with _cutting(path):
        tokenizer = Tokenizer.from_file(str(path))

    def encode(text: str) -> list[int]:
        with _cutting(path):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode


@contextmanager
def _cutting(path: Path) -> Iterator[None]:
    """Turn what the tokenizer's library raises into our error."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and panics, which is not even one
        raise TargetError(
            f"{path} does not cut text into ids ({error}); mend tokenizer.json in the checkpoint and export it again."
        ) from error


class Unsupported(TargetError):
    """ONNX Runtime has no kernel for an operator of the graph on this machine."""


class GraphRun:
    """A loaded graph and a KV cache bound in place; sizes are the graph's own."""

    def __init__(self, graph: Path) -> None:
        """Load a graph file; raises Unsupported, OutOfMemory, or TargetError for a graph that is wrong."""
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what is fatal is raised
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        # On shared cores a spinning thread takes the time of the one it waits for.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._graph = graph
        with _explained(graph):
            self._session = ort.InferenceSession(graph, options, providers=[PROVIDER])
        caches = [value for value in self._session.get_inputs() if value.name.startswith("past_")]
        logits = [value for value in self._session.get_outputs() if value.name == "logits"]
        self._names = [cache.name.removeprefix("past_") for cache in caches]
        match [value.shape for value in (*caches[:1], *logits)]:
            case [[_, int(kv_heads), _, int(head_dim)], [_, int(vocab)]]:
                is_half = caches[0].type == "tensor(float16)"
                self.kv = KvShape(len(caches) // 2, kv_heads, head_dim, "float16" if is_half else "float32")
                self.vocab = vocab
            case _:
                raise TargetError(
                    f"{graph} has no cache or no logits as a release's graph has; export the model again."
                )
        self.begin(1, 0)

    def begin(self, slots: int, capacity: int) -> None:
        """Forget everything; room for `slots` sequences of `capacity` positions."""
        shape = (len(self._names), slots, self.kv.kv_heads, capacity, self.kv.head_dim)
        self.pool: NDArray[Any] = np.zeros(shape, self.kv.dtype)

    def chunk(self, start: int, ids: Sequence[int] | Ids, wanted: Sequence[int] | Ids) -> Floats:
        """Read ids into the first slot from position `start` on; logits [len(wanted), vocab] of some of them."""
        end = np.array([start + len(ids)], np.int32)
        return self.step(0, np.array([ids], np.int64), end, np.array(wanted, np.int64))

    def step(self, slot: int, ids: Ids, lengths: NDArray[np.int32], wanted: Ids) -> Floats:
        """Run ids [b, s] in adjacent slots; lengths [b] after the step; logits [len(wanted), vocab], float32."""
        floats = self.pool.dtype.type
        logits = np.empty((len(wanted), self.vocab), floats)
        inputs = {
            "input_ids": np.ascontiguousarray(ids),
            "seqlens_k": lengths - np.int32(1),
            "total_length": np.array(lengths.max(), np.int32),
            "logits_indices": wanted,
        }
        with _explained(self._graph):
            binding = self._session.io_binding()
            for name, value in inputs.items():
                binding.bind_cpu_input(name, value)
            binding.bind_output("logits", "cpu", 0, floats, logits.shape, logits.ctypes.data)
            for name, cache in zip(self._names, self.pool, strict=True):
                view = cache[slot : slot + len(ids)]
                place = ("cpu", 0, floats, view.shape, view.ctypes.data)
                binding.bind_input(f"past_{name}", *place)
                binding.bind_output(f"present_{name}", *place)
            self._session.run_with_iobinding(binding)
        return logits.astype(np.float32, copy=False)


@dataclass
class _Sequence:
    """The first slot of a run as golden prompts see it."""

    run: GraphRun
    context_tokens: int
    length: int = 0

    def read(self, prompt: Sequence[int]) -> Floats:
        """Begin anew with the whole prompt as one chunk; logits of its last position."""
        self.run.begin(1, min(LENGTHS[0] + IDS, self.context_tokens))
        self.length = len(prompt)
        logits: Floats = self.run.chunk(0, prompt, [self.length - 1])[0]
        return logits

    def step(self, token: int) -> Floats:
        """Decode one id."""
        self.length += 1
        logits: Floats = self.run.step(
            0, np.array([[token]]), np.array([self.length], np.int32), np.zeros(1, np.int64)
        )[0]
        return logits


def _load(folder: Path, manifest: Manifest) -> GraphRun:
    """A release's graph, which is of the sizes that a node will take from the manifest."""
    run = GraphRun(folder / manifest.graph)
    if (run.kv, run.vocab) != (manifest.kv, manifest.vocab_size):
        raise TargetError(
            f"{manifest.graph} has a cache of {run.kv} and {run.vocab} logits, the manifest says {manifest.kv} and "
            f"{manifest.vocab_size}; export the model again."
        )
    return run


def _measure(
    folder: Path, manifest: Manifest, window_tokens: int, text: list[int], expected: Path | None, reference: str
) -> Ran:
    run, made_by = _load(folder, manifest), _made_by()
    trial = np.arange(trial_tokens(window_tokens, manifest.context_tokens), dtype=np.int64)
    invariance = measure_invariance(run, trial * 7919 % manifest.tokenizer_size)
    sequence = _Sequence(run, manifest.context_tokens)
    golden = [
        continue_greedily(sequence, prompt, manifest.tokenizer_size, manifest.stop_ids, made_by)
        for prompt in prompts(_encoder(folder, manifest), manifest.tokenizer_size, manifest.context_tokens)
    ]
    scored = score(_parts(run, manifest, text, expected))
    return Ran(invariance, tuple(golden), Quality(text=TEXT.name, score=scored, reference=reference, made_by=made_by))


def _retrace_all(folder: Path, manifest: Manifest) -> list[Retraced]:
    sequence = _Sequence(_load(folder, manifest), manifest.context_tokens)
    return [retrace(sequence, golden, manifest.tokenizer_size) for golden in manifest.golden]


def _compare(folder: Path, manifest: Manifest, ids: list[int], expected: Path) -> Score:
    return score(_parts(_load(folder, manifest), manifest, ids, expected))


def _parts(run: GraphRun, manifest: Manifest, ids: list[int], expected: Path | None) -> Iterator[Part]:
    """A text's logits and a reference's, without the padding ids that no sampler lets through."""
    theirs = None if expected is None else np.load(expected, mmap_mode="r")[:, : manifest.tokenizer_size]
    for start, logits in _logits(run, ids[:-1]):
        stop = start + len(logits)
        following = np.array(ids[start + 1 : stop + 1])
        yield Part(logits[:, : manifest.tokenizer_size], following, None if theirs is None else theirs[start:stop])


def _write_logits(graph: Path, ids: list[int], target: Path) -> None:
    """Logits [len(ids) - 1, vocab] of all ids but the last, into a .npy file."""
    run = GraphRun(graph)
    file: NDArray[np.float32] | None = None
    for start, logits in _logits(run, ids[:-1]):
        if file is None:
            file = np.lib.format.open_memmap(target, "w+", np.float32, (len(ids) - 1, logits.shape[1]))
        file[start : start + len(logits)] = logits


def _logits(run: GraphRun, ids: list[int]) -> Iterator[tuple[int, Floats]]:
    """All logits of a text, a few positions at a time with the first one's index; no chunk is of one token."""
    run.begin(1, len(ids))
    pieces = -(-len(ids) // _MOST_AT_ONCE)
    for start, stop in pairwise(len(ids) * piece // pieces for piece in range(pieces + 1)):
        yield start, run.chunk(start, ids[start:stop], range(stop - start))


def _in_child(work: Callable[..., Result], *arguments: object) -> Result | CannotRun:
    try:
        return child.call(work, *arguments)
    except (Unsupported, child.OutOfMemory) as error:
        return CannotRun(error.message)


def _obstacle(folder: Path, manifest: Manifest) -> str | None:
    """What can be seen beforehand that keeps a release from running here."""
    if manifest.operators:
        return f"ONNX Runtime does not have the operator {' or '.join(manifest.operators)}; a node brings it."
    return _shortage(folder)


def _shortage(folder: Path) -> str | None:
    """Whether the memory that is free holds what lies in a folder."""
    needed = sum(file.stat().st_size for file in folder.iterdir()) + _BESIDE_WEIGHTS_BYTES
    available = hardware.memory().available_bytes
    if needed > available:
        return f"Running it takes {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free here."
    return None


@contextmanager
def _explained(graph: Path) -> Iterator[None]:
    """Turn what ONNX Runtime raises into our errors: its own exceptions, and for some faults bare RuntimeError."""
    try:
        yield
    except NoKernel as error:
        raise Unsupported(
            f"ONNX Runtime {ort.__version__} cannot run it on this processor: {_words(error)}."
        ) from error
    except Exception as error:
        if not (type(error).__module__.startswith("onnxruntime") or isinstance(error, RuntimeError)):
            raise
        if "allocate memory" in str(error):
            raise child.OutOfMemory(f"Memory ran out while {graph.name} was running: {_words(error)}.") from error
        raise TargetError(f"ONNX Runtime {ort.__version__} cannot run {graph}: {_words(error)}.") from error


def _words(error: Exception) -> str:
    """The first sentence of what ONNX Runtime says, without its prefix "[ONNXRuntimeError] : 9 : NAME : "."""
    words = " ".join(str(error).split()).removeprefix("[ONNXRuntimeError] : ")
    return words.split(" : ", 2)[-1].partition(". ")[0].rstrip(".")


def _made_by() -> str:
    """The library and the processor: together they decide how sums are rounded."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"onnxruntime {ort.__version__} {PROVIDER} on {names[0] if names else platform.machine()}"
