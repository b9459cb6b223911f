"""A GGUF file as a checkpoint: tensors under Hugging Face's names and in their order of rows, a few rows at a time.

Bytes are read where they are asked for, never mapped: mapped pages count as this process's memory. Does not know what
the numbers become.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import SourceError
from export.forms.values import Blocks, Bytes, Plain
from export.sources import ggml
from export.sources.checkpoint import Extent
from export.sources.gguf_header import Header, Place, read_header
from export.sources.gguf_spec import ROPE_DIVISORS, gguf_name, hugging_face_name, read_spec, rotary_heads
from export.sources.gguf_speech import read_speech
from export.sources.speech import Speech
from export.spec import DecoderSpec, TensorInfo, check_tensors


@dataclass(frozen=True)
class GgufCheckpoint:
    """An open GGUF, see `export.sources.checkpoint.Checkpoint`. `places`: the tensors by Hugging Face's names."""

    path: Path
    spec: DecoderSpec
    speech: Speech
    places: Mapping[str, Place]

    @classmethod
    def open(cls, path: Path) -> GgufCheckpoint:
        """Read the header; raises SourceError, naming the file, if this is no whole model of a known kind."""
        header = _read_header(path)
        places = dict(header.tensors)
        divisors = _read_divisors(path, places.pop(ROPE_DIVISORS, None))
        spec = read_spec(header.metadata, {name: place.info for name, place in places.items()}, divisors, str(path))
        places = {hugging_face_name(name): place for name, place in places.items()}
        check_tensors(spec, _infos(places), str(path), gguf_name)
        speech = read_speech(header.metadata, str(path))
        if speech.size > spec.vocab:
            raise SourceError(f"{path} has {speech.size} tokens and an embedding of {spec.vocab}; fetch it again.")
        return cls(path, spec, speech, places)

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the model's kind."""
        return self.spec.family.value

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By Hugging Face's names."""
        return _infos(self.places)

    def read(self, name: str, start: int, stop: int) -> Plain | Blocks:
        """Rows of a tensor, `start` < `stop`; raises SourceError, naming both, for numbers that are not finite."""
        place = self.places[name]
        heads = rotary_heads(self.spec, name)
        if heads == 0:
            return _read_rows(self.path, place, start, stop)
        stored = _stored_rows(place.info.rows, heads)[start:stop]
        first, last = int(stored.min()), int(stored.max())
        return _take(_read_rows(self.path, place, first, last + 1), stored - first)

    def extents(self, name: str) -> list[Extent]:
        """Where a tensor's bytes lie."""
        place = self.places[name]
        return [Extent(self.path, place.offset, place.size_bytes)]


def _infos(places: Mapping[str, Place]) -> dict[str, TensorInfo]:
    """Tensors under the names that the places have."""
    return {name: TensorInfo(name, place.info.shape, place.info.kind) for name, place in places.items()}


def _stored_rows(rows: int, heads: int) -> NDArray[np.int64]:
    """Where llama.cpp put each row of q or k: rows i and i + head_dim / 2 of a head became 2i and 2i + 1."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _take(values: Plain | Blocks, rows: NDArray[np.int64]) -> Plain | Blocks:
    match values:
        case Plain():
            return Plain(values.weights[rows])
        case Blocks():
            return Blocks(values.bits, values.codes[rows], values.scales[rows], values.minimums[rows])


def _read_header(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            return read_header(file, os.fstat(file.fileno()).st_size, str(path))
    except FileNotFoundError as error:
        raise SourceError(f"There is no file {path}; `scripts/get-model` fetches one.") from error
    except OSError as error:
        raise SourceError(f"The file {path} cannot be read ({error.strerror}); name a GGUF file.") from error


def _read_divisors(path: Path, place: Place | None) -> tuple[float, ...] | None:
    if place is None:
        return None
    if len(place.info.shape) != 1 or not place.info.kind.is_float:
        raise SourceError(
            f"The tensor {ROPE_DIVISORS!r} of {path} is {place.info.kind} {place.info.shape}, not a list of floats; "
            "take another file of this model."
        )
    values = _read_rows(path, place, 0, place.info.rows)
    return tuple(values.to_doubles().reshape(-1).tolist())


def _read_rows(path: Path, place: Place, start: int, stop: int) -> Plain | Blocks:
    """Rows as they lie in the file."""
    info = place.info
    row_bytes = ggml.row_bytes(info.kind, info.columns if len(info.shape) > 1 else 1)
    raw = _read_bytes(path, info.name, place.offset + start * row_bytes, (stop - start) * row_bytes)
    with np.errstate(invalid="ignore"):  # what comes of an infinite scale is refused below
        values = ggml.decode(raw.reshape(stop - start, row_bytes), info.kind)
    match values:
        case Plain():
            finite = np.isfinite(values.weights).all()
        case Blocks():
            finite = np.isfinite(values.scales).all() and np.isfinite(values.minimums).all()
    if not finite:
        raise SourceError(
            f"The tensor {info.name!r} of {path} has numbers that are not finite; the file is damaged, fetch it again."
        )
    return values


def _read_bytes(path: Path, tensor: str, offset: int, count: int) -> Bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(count)
    except OSError as error:
        raise SourceError(f"{path} cannot be read any more ({error.strerror}); begin again.") from error
    if len(data) != count:
        raise SourceError(f"{path} ends in the middle of the tensor {tensor!r}; fetch it again.")
    return np.frombuffer(data, np.uint8)
