"""The ways to write a release, by name, and which form they give to each tensor.

A tensor that is quantised in its source is carried as it stands; only floats are quantised, as the recipe and --dense
say. The one exception says so: int4 recipes requantise MXFP4 experts. A plan's `variant` names the release's variant.
Does not know tensor names, files or graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from export.errors import SourceError
from export.forms import Form
from export.spec import DecoderSpec, Kind, Role, TensorInfo


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


@dataclass(frozen=True)
class Plan:
    """A recipe and its option; everything a graph builder asks about forms."""

    recipe: Recipe
    dense: Dense = Dense.INT8

    @property
    def variant(self) -> str:
        """The release's variant: outputs are a pure function of it, so every option that changes them shows."""
        return self.recipe.value if self.dense is Dense.INT8 else f"{self.recipe}-dense-exact"

    def form(self, spec: DecoderSpec, role: Role, kind: Kind) -> Form:
        """The form of a matrix; raises SourceError if this recipe has none for it."""
        raise NotImplementedError
