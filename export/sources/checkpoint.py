"""What the exporter asks of a checkpoint, whatever files it lies in.

Implemented by `export/sources/safetensors.py` and `export/sources/gguf.py`, opened by `export/sources/opening.py`.
A checkpoint is read a few rows at a time and never mapped: what is not asked for takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from export.forms.values import Values
from export.sources.speech import Speech
from export.spec import DecoderSpec, TensorInfo


@dataclass(frozen=True)
class Extent:
    """A range of bytes of a source file."""

    path: Path
    offset: int
    size_bytes: int


class Checkpoint(Protocol):
    """An open checkpoint, checked to be whole: `tensors` are exactly what `spec` asks for (`spec.check_tensors`)."""

    @property
    def name(self) -> str:
        """What people call it: the file's, folder's or hub's name, without this machine's path."""
        ...

    @property
    def architecture(self) -> str:
        """What the checkpoint calls its own kind ("GptOssForCausalLM", "llama")."""
        ...

    @property
    def spec(self) -> DecoderSpec:
        """Sizes."""
        ...

    @property
    def speech(self) -> Speech:
        """Tokenizer and template."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By Hugging Face name."""
        ...

    def read(self, name: str, start: int, stop: int) -> Values:
        """Rows `start` to `stop` of a tensor [rows, columns] (all axes but the last taken together; a vector of n
        is one row a number, [n, 1]).

        Raises SourceError, naming file and tensor, for bytes that are missing or numbers that are not finite
        (MXFP4: an exponent of 255).
        """
        ...

    def extents(self, name: str) -> list[Extent]:
        """Where a tensor's bytes lie, for digests and progress; MXFP4: codes, then scales."""
        ...
