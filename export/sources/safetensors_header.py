"""Headers of safetensors files: which tensors lie where, checked so that every byte of the file belongs to one tensor.

A file is 8 bytes of header length (little endian), a JSON header, then the tensors' bytes without gaps. Source: the
format's own description (github.com/huggingface/safetensors, README, version 0.8). The library behind it maps whole
files, and mapped pages count as memory, so the few lines are read here. Does not know files or what tensors mean.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from export.errors import SourceError
from export.sources.hf_json import shown

PREFIX_BYTES = 8
#: The format allows 100 MB. Ours is lower, because JSON takes thirty times its size while it is parsed; a real header
#: has about 130 bytes a tensor, so this is room for a hundred thousand of them in one file.
MAX_HEADER_BYTES = 16 << 20

#: Bits of an element, by the format's names.
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
        **dict.fromkeys(("U32", "I32", "F32"), 32),
        **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        "F4": 4,
    }
)

_METADATA = "__metadata__"
_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
_Shape = Annotated[list[_Size], msgspec.Meta(max_length=8)]


@dataclass(frozen=True)
class HeaderTensor:
    """One tensor: dtype by the format's name, offset from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: _Shape
    data_offsets: tuple[_Size, _Size]


def header_bytes(prefix: bytes, file_bytes: int, where: str) -> int:
    """Length of the JSON text, out of the file's first 8 bytes; raises SourceError if it cannot be one."""
    if len(prefix) < PREFIX_BYTES:
        raise SourceError(f"{where} is no safetensors file, it has {file_bytes} bytes; fetch it again.")
    size = int.from_bytes(prefix, "little")
    if size > MAX_HEADER_BYTES:
        raise SourceError(
            f"{where} is no safetensors file: its header would have {size} bytes, {MAX_HEADER_BYTES} are the most "
            "that is read; fetch it again."
        )
    if PREFIX_BYTES + size > file_bytes:
        raise SourceError(f"{where} is cut short inside its header; fetch it again.")
    return size


def parse_header(text: bytes, file_bytes: int, where: str) -> dict[str, HeaderTensor]:
    """The file's tensors by name, in the order of their bytes.

    text: the JSON alone; file_bytes: size of the whole file. Raises SourceError, naming `where` and the tensor, unless
    the tensors cover the rest of the file exactly, each as large as its shape and type say.
    """
    begin = PREFIX_BYTES + len(text)
    tensors = [_tensor(name, value, begin, where) for name, value in _objects(text, where).items() if name != _METADATA]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
    end = begin
    for tensor in tensors:
        if tensor.offset != end:
            raise SourceError(
                f"The tensor {shown(tensor.name)} of {where} should begin at byte {end}, its header says "
                f"{tensor.offset}; the file is damaged, fetch it again."
            )
        end += tensor.size_bytes
        if end > file_bytes:
            raise SourceError(
                f"{where} is cut short: the tensor {shown(tensor.name)} should end at byte {end}, the file has "
                f"{file_bytes}; fetch it again."
            )
    if end != file_bytes:
        raise SourceError(f"{where} has {file_bytes - end} bytes that belong to no tensor; fetch it again.")
    return {tensor.name: tensor for tensor in tensors}


def _objects(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object; the standard parser, because it alone shows a name that occurs twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise SourceError(f"The header of {where} names {shown(twice)} twice; the file is damaged, fetch it again.")
        return found

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"The header of {where} is not JSON ({error}); fetch it again.") from error
    if not isinstance(header, dict):
        raise SourceError(f"The header of {where} is no JSON object; fetch it again.")
    return header


def _tensor(name: str, value: object, begin: int, where: str) -> HeaderTensor:
    try:
        entry = msgspec.convert(value, _Entry)
    except msgspec.ValidationError as error:
        raise SourceError(
            f"The tensor {shown(name)} of {where} is badly described ({error}); the file is damaged, fetch it again."
        ) from error
    bits = DTYPE_BITS.get(entry.dtype)
    if bits is None:
        raise SourceError(
            f"The tensor {shown(name)} of {where} is of the type {shown(entry.dtype)}, which this version does not "
            "know; take a checkpoint in BF16, F16 or F32."
        )
    first, end = entry.data_offsets
    if prod(entry.shape) * bits != (end - first) * 8:
        raise SourceError(
            f"The tensor {shown(name)} of {where} has {end - first} bytes, which does not fit {entry.dtype} "
            f"{entry.shape}; the file is damaged, fetch it again."
        )
    return HeaderTensor(name, entry.dtype, tuple(entry.shape), begin + first, end - first)
