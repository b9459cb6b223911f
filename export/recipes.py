"""The ways to write a release, by name, and which form they give to each tensor.

A tensor that is quantised in its source is carried as it stands; only floats are quantised, as the recipe and --dense
say. The one exception says so: int4 recipes requantise MXFP4 experts. A plan's `variant` names the release's variant.
Does not know tensor names, files or graphs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from export.errors import SourceError
from export.forms.experts import ExpertBits, ExpertFloat, ExpertFp4, ExpertMxfp4
from export.forms.form import Form
from export.forms.matrix import Corrected, DenseFloat, Symmetric, ZeroPointed
from export.forms.values import MXFP4_BLOCK
from export.spec import DecoderSpec, Kind, Role

BLOCK = 32
"""Neighbours that share a scale where the recipe itself quantises; also GGUF's, but for Q6_K's 16."""

FROM_GGUF = (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K, Kind.Q6_K)
"""Kinds that are quantised in the checkpoint, in blocks."""

_FLOAT32, _FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)


class Device(StrEnum):
    """What runs a release."""

    CPU = "cpu"
    CUDA = "cuda"


class Dense(StrEnum):
    """What becomes of float matrices beside the bulk of the weights (attention of a model with experts; the
    embedding; the head)."""

    INT8 = "int8"
    EXACT = "exact"


class Recipe(StrEnum):
    """How source weights are carried into ONNX."""

    CUDA_FP4 = "cuda-fp4"
    CUDA_INT8 = "cuda-int8"
    CUDA_INT4 = "cuda-int4"
    CPU_INT8 = "cpu-int8"
    CPU_INT4 = "cpu-int4"
    CPU_MXFP4 = "cpu-mxfp4"
    FP32 = "fp32"
    GGUF_EXACT = "gguf-exact"
    GGUF_PARITY = "gguf-parity"

    @property
    def device(self) -> Device:
        """What runs it."""
        return Device.CUDA if self.value.startswith("cuda-") else Device.CPU

    @property
    def purpose(self) -> str:
        """One line for --help."""
        return _PURPOSES[self]

    @property
    def bits(self) -> int | None:
        """Width of the codes that float matrices of the bulk become; None: the recipe quantises none of the bulk."""
        match self:
            case Recipe.CPU_INT8 | Recipe.CUDA_INT8:
                return 8
            case Recipe.CPU_INT4 | Recipe.CUDA_INT4:
                return 4
            case _:
                return None

    @property
    def quantises_dense(self) -> bool:
        """Whether --dense makes a difference."""
        return self not in (Recipe.FP32, Recipe.GGUF_EXACT, Recipe.GGUF_PARITY)

    def misfit(self, spec: DecoderSpec, kinds: Collection[Kind]) -> str | None:
        """Why a checkpoint with tensors of these kinds cannot be exported so; None if it can."""
        match self:
            case Recipe.CUDA_FP4 | Recipe.CPU_MXFP4 if spec.experts is None:
                return f"the recipe {self} is for models with MXFP4 experts, this {spec.family} model has none"
            case Recipe.GGUF_EXACT | Recipe.GGUF_PARITY if not any(kind in FROM_GGUF for kind in kinds):
                return f"the recipe {self} carries the quantised tensors of a GGUF, this checkpoint has none"
            case _:
                return None


_PURPOSES = {
    Recipe.CUDA_FP4: "GPU: MXFP4 experts unchanged, the smallest; slow on GPUs without fp4 units",
    Recipe.CUDA_INT8: "GPU: 8 bits; the values of MXFP4 experts are exact",
    Recipe.CUDA_INT4: "GPU: 4 bits, lossy (also for MXFP4 experts)",
    Recipe.CPU_INT8: "CPU: 8 bits; the values of MXFP4 experts are exact",
    Recipe.CPU_INT4: "CPU: 4 bits, lossy (also for MXFP4 experts)",
    Recipe.CPU_MXFP4: "CPU: MXFP4 experts unchanged; needs an operator that ONNX Runtime does not have",
    Recipe.FP32: "nothing quantised: small models, and comparisons",
    Recipe.GGUF_EXACT: "CPU: a GGUF's quantised weights, not requantised",
    Recipe.GGUF_PARITY: "CPU: the same by the slow way, to compare with",
}


@dataclass(frozen=True)
class Plan:
    """A recipe and its option; everything a graph builder asks about forms."""

    recipe: Recipe
    dense: Dense = Dense.INT8

    @property
    def variant(self) -> str:
        """The release's variant: outputs are a pure function of it, so every option that changes them shows."""
        changes = self.dense is Dense.EXACT and self.recipe.quantises_dense
        return f"{self.recipe}-dense-exact" if changes else self.recipe.value

    @property
    def floats(self) -> np.dtype[Any]:
        """What the graph computes in, and scales are stored in."""
        return _FLOAT16 if self.recipe.device is Device.CUDA else _FLOAT32

    def promise(self, spec: DecoderSpec) -> str:
        """What the release's weights are, for its manifest. "Lossless" is said of experts alone."""
        parts = [self._promise_of_experts()] if spec.experts is not None else []
        match self.recipe:
            case Recipe.FP32 | Recipe.GGUF_EXACT | Recipe.GGUF_PARITY:
                parts.append("nothing is quantised that was not quantised in the checkpoint")
            case _ if spec.experts is None and self.recipe.bits is not None:
                parts.append(f"float matrices of the layers are rounded to {self.recipe.bits} bits")
            case _:
                pass
        if self.recipe.quantises_dense:
            attention = "attention, " if spec.experts is not None else ""
            parts.append(f"{attention}embedding and head are {self._promise_of_dense()}")
        return "; ".join(parts)

    def _promise_of_experts(self) -> str:
        match self.recipe:
            case Recipe.CPU_INT4 | Recipe.CUDA_INT4:
                return "experts are requantised to 4 bits, which is lossy"
            case Recipe.CPU_INT8 | Recipe.CUDA_INT8:
                return "experts are lossless, every MXFP4 value as an 8-bit code"
            case Recipe.FP32:
                return "experts are lossless, every MXFP4 value as a float"
            case _:
                return "experts are lossless, the published codes and scales"

    def _promise_of_dense(self) -> str:
        if self.dense is Dense.INT8:
            return "rounded to 8 bits"
        return "as in the checkpoint" if self.floats == _FLOAT32 else "float16"

    def check(self, spec: DecoderSpec, kinds: Collection[Kind]) -> None:
        """Raise SourceError if the recipe is not for a checkpoint with tensors of these kinds."""
        misfit = self.recipe.misfit(spec, kinds)
        if misfit is not None:
            raise SourceError(f"It cannot be exported: {misfit}; take another --recipe.")

    def form(self, spec: DecoderSpec, role: Role, kind: Kind) -> Form:
        """The form of a matrix (of one expert's, for experts); raises SourceError if this recipe has none for it."""
        if role is Role.ROUTER:
            return DenseFloat(_FLOAT32)
        if kind is Kind.MXFP4:
            return self._expert_form()
        return self._float_form(spec, role, kind) if kind.is_float else self._block_form(kind)

    def _expert_form(self) -> Form:
        match self.recipe:
            case Recipe.CUDA_FP4:
                return ExpertFp4()
            case Recipe.CPU_MXFP4:
                return ExpertMxfp4()
            case Recipe.CPU_INT8 | Recipe.CUDA_INT8:
                return ExpertBits(8, MXFP4_BLOCK, self.floats)
            case Recipe.CPU_INT4 | Recipe.CUDA_INT4:
                return ExpertBits(4, MXFP4_BLOCK, self.floats)
            case Recipe.FP32:
                return ExpertFloat(_FLOAT32)
            case Recipe.GGUF_EXACT | Recipe.GGUF_PARITY:
                raise SourceError(
                    f"The recipe {self.recipe} has no form for MXFP4 experts; take {Recipe.CPU_INT8} or "
                    f"{Recipe.CUDA_INT8}, which keep their values."
                )

    def _block_form(self, kind: Kind) -> Form:
        """As it stands. Scales of Q4_0, Q4_1 and Q8_0 are float16 in the file; those of the others are products."""
        if self.recipe is Recipe.FP32:
            return DenseFloat(_FLOAT32, exact=False)
        match kind:
            case Kind.Q4_0:
                return Symmetric(4, BLOCK, self.floats)
            case Kind.Q8_0:
                return Symmetric(8, BLOCK, self.floats)
            case Kind.Q6_K:
                return Symmetric(8, BLOCK // 2, self.floats, exact=self.floats == _FLOAT32)
            case Kind.Q4_1 | Kind.Q4_K if self.recipe is Recipe.GGUF_PARITY:
                return ZeroPointed(4, BLOCK, self.floats)
            case _:
                return Corrected(4, BLOCK, self.floats)

    def _float_form(self, spec: DecoderSpec, role: Role, kind: Kind) -> Form:
        bits = self._bits(spec, role)
        if bits is None:
            return DenseFloat(self.floats, exact=self.floats == _FLOAT32 or kind is Kind.F16)
        return Symmetric(bits, BLOCK, self.floats, exact=False)

    def _bits(self, spec: DecoderSpec, role: Role) -> int | None:
        """Width of the codes of a float matrix; None: it stays float."""
        is_bulk = spec.experts is None and role in (Role.FEED_FORWARD, Role.ATTENTION)
        if is_bulk:
            return self.recipe.bits
        return 8 if self.recipe.quantises_dense and self.dense is Dense.INT8 else None
