"""Which recipe suits a checkpoint and a machine, and why: `--recipe auto`.

The best recipe that fits into memory: weights as the plan stores them, the cache of one long conversation, room to
work. What could not be taken, and what the chosen one loses, is said. Does not know how a machine is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from export.errors import SourceError
from export.recipes import BLOCK, FROM_GGUF, Dense, Device, Plan, Recipe
from export.spec import DecoderSpec, Role, TensorInfo, expected_tensors

_CONVERSATION_TOKENS = 4096
_WORKING_BYTES = 10**9
_SHARE = 0.9
"""Of a machine's memory; the rest is left to everything else that runs."""

_FP4_UNITS = (12, 0)
"""Compute capability from which ONNX Runtime multiplies fp4 natively. Source: its notes on QMoE for CUDA."""


@dataclass(frozen=True)
class Hardware:
    """What will run the release. cuda_memory_bytes None: no GPU. cuda_capability: the GPU's (major, minor)."""

    cuda_memory_bytes: int | None
    memory_bytes: int
    cuda_capability: tuple[int, int] = (0, 0)


def choose(
    spec: DecoderSpec, tensors: Mapping[str, TensorInfo], hardware: Hardware, dense: Dense = Dense.INT8
) -> tuple[Recipe, str]:
    """The recipe, and a clause that says why. If nothing fits, the smallest for the CPU.

    Raises SourceError, naming the tensor, if no recipe has a form for it.
    """
    too_large: list[str] = []
    for recipe in _candidates(spec, tensors, hardware):
        needed, there = needed_bytes(Plan(recipe, dense), spec, tensors), _memory_bytes(hardware, recipe.device)
        size = f"about {_gigabytes(needed)} of {_whose(recipe.device)} {_gigabytes(there)} of memory"
        if needed <= _SHARE * there:
            return recipe, "; ".join([_reason(recipe, spec), f"it takes {size}", *too_large])
        too_large.append(f"{recipe} would take {size}")
    return recipe, "; ".join([_reason(recipe, spec), "nothing smaller is left to take", *too_large])


def needed_bytes(plan: Plan, spec: DecoderSpec, tensors: Mapping[str, TensorInfo]) -> int:
    """Memory to run the release with: weights, one long conversation, room to work."""
    tokens = min(spec.context_tokens, _CONVERSATION_TOKENS)
    cache_bytes = 2 * spec.layers * spec.kv_heads * spec.head_dim * plan.floats.itemsize * tokens
    return weights_bytes(plan, spec, tensors) + cache_bytes + _WORKING_BYTES


def weights_bytes(plan: Plan, spec: DecoderSpec, tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of all weights as the plan stores them, without padding.

    Raises SourceError, naming the tensor, if the plan has no form for it.
    """
    return sum(
        _tensor_bytes(plan, spec, tensors[name], expected.role) for name, expected in expected_tensors(spec).items()
    )


def _tensor_bytes(plan: Plan, spec: DecoderSpec, tensor: TensorInfo, role: Role) -> int:
    if role is Role.VECTOR:
        return prod(tensor.shape) * plan.floats.itemsize
    *stacked, rows, columns = tensor.shape
    form = plan.form(spec, role, tensor.kind)
    try:
        stored = form.stored(rows, columns)
    except ValueError as error:
        raise SourceError(
            f"The tensor {tensor.name!r} cannot be stored as {form.label} ({error}); choose another --recipe."
        ) from error
    return prod(stacked) * sum(array.size_bytes for array in stored.values())


def _candidates(spec: DecoderSpec, tensors: Mapping[str, TensorInfo], hardware: Hardware) -> Iterator[Recipe]:
    """Best first; at least one."""
    is_gguf = any(tensor.kind in FROM_GGUF for tensor in tensors.values())
    has_blocks = all(tensor.columns % BLOCK == 0 for tensor in tensors.values() if len(tensor.shape) > 1)
    if hardware.cuda_memory_bytes is not None and has_blocks:
        yield from _for_cuda(spec, is_gguf, hardware.cuda_capability)
    if is_gguf:
        yield Recipe.GGUF_EXACT
    elif has_blocks:
        yield from (Recipe.CPU_INT8, Recipe.CPU_INT4)
    else:
        yield Recipe.FP32


def _for_cuda(spec: DecoderSpec, is_gguf: bool, capability: tuple[int, int]) -> tuple[Recipe, ...]:
    if spec.experts is not None:
        fp4_first = (Recipe.CUDA_FP4, Recipe.CUDA_INT8)
        return fp4_first if capability >= _FP4_UNITS else fp4_first[::-1]
    return (Recipe.CUDA_INT8,) if is_gguf else (Recipe.CUDA_INT8, Recipe.CUDA_INT4)


def _reason(recipe: Recipe, spec: DecoderSpec) -> str:
    """What speaks for it, and what it loses."""
    experts = spec.experts is not None
    match recipe:
        case Recipe.GGUF_EXACT:
            return "what is quantised in the GGUF is carried over as it stands"
        case Recipe.CUDA_FP4:
            return "experts stay the published bytes; fast on GPUs with fp4 units, slower than 8 bits on others"
        case Recipe.CUDA_INT8 | Recipe.CPU_INT8 if experts:
            return "the values of the experts are exact in 8 bits"
        case Recipe.CPU_INT4 if experts:
            return (
                f"4 bits are lossy (expert weights are off by about 7 %); {Recipe.CPU_MXFP4} would be lossless, but "
                "needs an operator that ONNX Runtime does not have"
            )
        case Recipe.CUDA_INT4 | Recipe.CPU_INT4:
            return "4 bits are lossy"
        case Recipe.FP32:
            return f"rows that cannot be cut into blocks of {BLOCK} cannot be quantised"
        case _:
            return "8 bits lose next to nothing"


def _memory_bytes(hardware: Hardware, device: Device) -> int:
    return (hardware.cuda_memory_bytes or 0) if device is Device.CUDA else hardware.memory_bytes


def _whose(device: Device) -> str:
    return "the GPU's" if device is Device.CUDA else "this machine's"


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
