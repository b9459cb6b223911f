"""The ways to write a release, by name. A recipe's name is the release's `variant`."""

from __future__ import annotations

from enum import StrEnum


class Recipe(StrEnum):
    """How source weights are carried into ONNX."""

    GGUF_EXACT = "gguf-exact"
    GGUF_PARITY = "gguf-parity"

    @property
    def accuracy_level(self) -> int:
        """MatMulNBits' accuracy_level: 4 computes with int8 activations, 0 in float32."""
        match self:
            case Recipe.GGUF_EXACT:
                return 4
            case Recipe.GGUF_PARITY:
                return 0

    @property
    def purpose(self) -> str:
        """One line for `--help`."""
        match self:
            case Recipe.GGUF_EXACT:
                return "for serving: weights exact, int8 activations"
            case Recipe.GGUF_PARITY:
                return "the oracle for tests: weights to float32 rounding, float32 activations, ten times slower"
