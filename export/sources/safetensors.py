"""A Hugging Face folder (config.json, tokenizer.json, safetensors) as a checkpoint.

MXFP4 experts are two tensors in the files, `X_blocks` and `X_scales`, and one here, `X`. Layout: openai/gpt-oss-20b,
as transformers 5.23 reads it. Nothing is mapped or cached: a read takes the memory of its rows. Does not know recipes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import SourceError
from export.forms.values import MXFP4_BLOCK, Bytes, Floats, Mxfp4, Plain, Values
from export.sources.checkpoint import Extent
from export.sources.hf_config import architecture_of, read_config, read_spec
from export.sources.hf_json import shown
from export.sources.hf_speech import SpeechFiles, read_speech
from export.sources.safetensors_files import Located, locate_tensors, read_rows, read_small
from export.sources.speech import Speech
from export.spec import DecoderSpec, Family, Kind, TensorInfo, check_tensors

_MAX_CONFIG_BYTES = 16 << 20
_MAX_TOKENIZER_BYTES = 256 << 20
#: Of both tables at a time, when two are compared.
_COMPARED_BYTES = 8 << 20

_FLOAT_KINDS = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16}
_BLOCKS, _SCALES = "_blocks", "_scales"
_NO_NUMBER = 255

#: Old versions of transformers saved this buffer of the rotary embedding; it follows from config.json.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_EXPERT_PRODUCTS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


@dataclass(frozen=True)
class FloatTensor:
    """A tensor whose numbers stand for themselves."""

    info: TensorInfo
    stored: Located


@dataclass(frozen=True)
class Mxfp4Tensor:
    """Experts: codes [experts, rows, blocks, 16] and exponents [experts, rows, blocks]."""

    info: TensorInfo
    codes: Located
    exponents: Located


Source = FloatTensor | Mxfp4Tensor


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """A checked folder; see `export/sources/checkpoint.py`. Tensors are read from the files each time."""

    name: str
    architecture: str
    spec: DecoderSpec
    speech: Speech
    tensors: Mapping[str, TensorInfo]
    sources: Mapping[str, Source]

    @classmethod
    def open(cls, folder: Path, name: str | None = None) -> SafetensorsCheckpoint:
        """Read and check everything but the weights; `name`: instead of the folder's. Raises SourceError."""
        where = str(folder)
        data = read_small(folder / "config.json", _MAX_CONFIG_BYTES)
        config = read_config(data, str(folder / "config.json"))
        spec = read_spec(config, str(folder / "config.json"))
        located = locate_tensors(folder)
        _refuse_dequantised(spec, located)
        sources = _sources(_without_unused(spec, located))
        tensors = {source.info.name: source.info for source in sources}
        check_tensors(spec, tensors, where)
        return cls(
            name=name or folder.resolve().name,
            architecture=architecture_of(config),
            spec=spec,
            speech=read_speech(_speech_files(folder, data), spec),
            tensors=tensors,
            sources={source.info.name: source for source in sources},
        )

    def read(self, name: str, start: int, stop: int) -> Values:
        """Rows `start` to `stop` of a tensor [rows, columns]; see `export/sources/checkpoint.py`."""
        match self.sources[name]:
            case FloatTensor(info, stored):
                return Plain(_read_floats(info, stored, start, stop))
            case Mxfp4Tensor(info, codes, exponents):
                blocks = (stop - start, info.columns // MXFP4_BLOCK, MXFP4_BLOCK // 2)
                packed = read_rows(codes, info.rows, start, stop).reshape(blocks)
                return Mxfp4(packed, _read_exponents(info, exponents, start, stop))

    def extents(self, name: str) -> list[Extent]:
        """Where a tensor's bytes lie; MXFP4: codes, then scales."""
        match self.sources[name]:
            case FloatTensor(_, stored):
                return [_extent(stored)]
            case Mxfp4Tensor(_, codes, exponents):
                return [_extent(codes), _extent(exponents)]


def _speech_files(folder: Path, config: bytes) -> SpeechFiles:
    def optional(file: str, most: int = _MAX_CONFIG_BYTES) -> bytes | None:
        return read_small(folder / file, most) if (folder / file).exists() else None

    return SpeechFiles(
        folder=str(folder),
        config=config,
        tokenizer=optional("tokenizer.json", _MAX_TOKENIZER_BYTES),
        tokenizer_config=optional("tokenizer_config.json"),
        chat_template=optional("chat_template.jinja"),
        generation_config=optional("generation_config.json"),
    )


def _refuse_dequantised(spec: DecoderSpec, located: Mapping[str, Located]) -> None:
    for name, stored in located.items():
        if spec.family is Family.GPT_OSS and name.endswith(_EXPERT_PRODUCTS):
            raise SourceError(
                f"The experts {shown(name)} of {stored.path} are stored as {stored.tensor.dtype}: a dequantised copy, "
                "whose MXFP4 codes are gone; take the checkpoint as it was published (openai/gpt-oss-20b)."
            )


def _without_unused(spec: DecoderSpec, located: Mapping[str, Located]) -> dict[str, Located]:
    """Leave out what no graph needs because it is in the checkpoint another time."""
    used = {name: stored for name, stored in located.items() if not _DERIVED.fullmatch(name)}
    if spec.tied_head and _HEAD in used and _EMBEDDING in used:
        # Saved along with the embedding that it is; transformers ties the two only if they are equal.
        head = used.pop(_HEAD)
        if not _are_equal(head, used[_EMBEDDING]):
            raise SourceError(
                f"The tensor {_HEAD!r} of {head.path} differs from {_EMBEDDING!r}, though config.json ties the two; "
                "set tie_word_embeddings to false there if the head is meant."
            )
    return used


def _are_equal(one: Located, other: Located) -> bool:
    """Whether two tensors are the same bytes."""
    if (one.tensor.dtype, one.tensor.shape) != (other.tensor.dtype, other.tensor.shape):
        return False
    size = one.tensor.size_bytes
    cuts = [(start, min(start + _COMPARED_BYTES, size)) for start in range(0, size, _COMPARED_BYTES)]
    return all(np.array_equal(read_rows(one, size, *cut), read_rows(other, size, *cut)) for cut in cuts)


def _sources(located: Mapping[str, Located]) -> list[Source]:
    experts = {name[: -len(end)] for name in located for end in (_BLOCKS, _SCALES) if name.endswith(end)}
    floats = [_float_tensor(name, stored) for name, stored in located.items() if not name.endswith((_BLOCKS, _SCALES))]
    return [*floats, *(_mxfp4_tensor(name, located) for name in sorted(experts))]


def _float_tensor(name: str, stored: Located) -> FloatTensor:
    kind = _FLOAT_KINDS.get(stored.tensor.dtype)
    if kind is None:
        raise SourceError(
            f"The tensor {shown(name)} of {stored.path} is stored as {stored.tensor.dtype}; this exporter reads "
            f"{', '.join(_FLOAT_KINDS)}, and MXFP4 for experts."
        )
    return FloatTensor(TensorInfo(name, stored.tensor.shape, kind), stored)


def _mxfp4_tensor(name: str, located: Mapping[str, Located]) -> Mxfp4Tensor:
    codes, exponents = _of_experts(name + _BLOCKS, located), _of_experts(name + _SCALES, located)
    match codes.tensor.shape:
        case (experts, rows, blocks, 16) if exponents.tensor.shape == (experts, rows, blocks):
            return Mxfp4Tensor(TensorInfo(name, (experts, rows, blocks * MXFP4_BLOCK), Kind.MXFP4), codes, exponents)
    raise SourceError(
        f"The tensor {shown(codes.tensor.name)} of {codes.path} is {codes.tensor.shape} and its scales are "
        f"{exponents.tensor.shape}; MXFP4 is [experts, rows, blocks, 16] and [experts, rows, blocks], fetch it again."
    )


def _of_experts(name: str, located: Mapping[str, Located]) -> Located:
    stored = located.get(name)
    if stored is None:
        beside = next(other for other in located if other.startswith(name[: -len(_BLOCKS)]))
        raise SourceError(
            f"{located[beside].path} has {shown(beside)} but there is no {shown(name)}; fetch the checkpoint again."
        )
    if stored.tensor.dtype != "U8":
        raise SourceError(
            f"The tensor {shown(name)} of {stored.path} is stored as {stored.tensor.dtype}, not U8; fetch it again."
        )
    return stored


def _read_floats(info: TensorInfo, stored: Located, start: int, stop: int) -> Floats:
    weights = _to_float32(read_rows(stored, info.rows, start, stop), info.kind)
    _refuse_bad_rows(np.isfinite(weights), start, stored, "a number that is not finite")
    return weights


def _read_exponents(info: TensorInfo, stored: Located, start: int, stop: int) -> Bytes:
    exponents = read_rows(stored, info.rows, start, stop)
    _refuse_bad_rows(exponents != _NO_NUMBER, start, stored, f"the exponent {_NO_NUMBER}, which is no number,")
    return exponents


def _to_float32(data: Bytes, kind: Kind) -> Floats:
    """Stored rows [rows, bytes] as float32 [rows, columns], exactly: bf16 is float32's upper half."""
    match kind:
        case Kind.F32:
            return data.view(np.float32)
        case Kind.F16:
            return data.view(np.float16).astype(np.float32)
        case _:
            wide: NDArray[np.uint32] = np.left_shift(data.view(np.uint16), np.uint32(16), dtype=np.uint32)
            return wide.view(np.float32)


def _refuse_bad_rows(good: NDArray[np.bool_], start: int, stored: Located, what: str) -> None:
    """Raise SourceError naming the first row [rows, columns] that is not good all along."""
    if not good.all():
        row = start + int(np.argmin(good.all(axis=1)))
        raise SourceError(
            f"The tensor {shown(stored.tensor.name)} of {stored.path} has {what} in row {row}; "
            "the file is damaged, fetch it again."
        )


def _extent(stored: Located) -> Extent:
    return Extent(stored.path, stored.tensor.offset, stored.tensor.size_bytes)
