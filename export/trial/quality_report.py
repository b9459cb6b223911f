"""`quality.json`: how near a release is to its checkpoint, tensor by tensor and as a whole.

Does not know who measured it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from math import prod

import msgspec

from export.errors import TargetError
from export.forms.fidelity import Fidelity
from export.spec import TensorInfo
from export.trial.quality import Quality


class TensorQuality(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One source tensor in the release.

    broken: weights farther from the source than the form promises. max_error: the largest distance. relative_rms: of
    all errors, relative to that of the weights. exact: every weight is the very number of the source.
    """

    form: str
    weights: int
    broken: int
    max_error: float
    relative_rms: float
    exact: bool

    @classmethod
    def of(cls, found: Fidelity) -> TensorQuality:
        """Out of what was found while it was written."""
        return cls(found.form, found.weights, found.broken, found.max_error, found.relative_rms, found.exact)


class Totals(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of all weights: in the release, and in 32 bits each. ratio: the first by the second."""

    bytes: int
    fp32_bytes: int
    ratio: float


class QualityReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """run: what came of running the release, or a sentence that says why it was not run."""

    totals: Totals
    run: Quality | str
    tensors: dict[str, TensorQuality]

    def weights_claim(self, experts: Set[str]) -> str:
        """The tensors in one sentence, for the manifest; `experts`: names of those that are experts' weights."""
        inexact = [name for name, tensor in self.tensors.items() if not tensor.exact]
        if not inexact:
            return "every weight is the very number that the source stands for (compared in float64)"
        worst = max(inexact, key=lambda name: self.tensors[name].relative_rms)
        kept = ""
        if experts:
            kept = ", all experts among them" if experts.isdisjoint(inexact) else ", experts not among them"
        return (
            f"{len(self.tensors) - len(inexact)} of {len(self.tensors)} tensors are exact (compared in float64){kept}; "
            "the others are within the bound of their form, the largest relative error is "
            f"{self.tensors[worst].relative_rms:.2g} ({worst})"
        )


def totals_of(size_bytes: int, tensors: Mapping[str, TensorInfo]) -> Totals:
    """Compare the data file with the same weights in float32."""
    fp32_bytes = sum(4 * prod(tensor.shape) for tensor in tensors.values())
    return Totals(size_bytes, fp32_bytes, round(size_bytes / fp32_bytes, 4))


def encode_report(report: QualityReport) -> bytes:
    """Stable, human-readable JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def decode_report(data: bytes, where: str) -> QualityReport:
    """Inverse of `encode_report`; raises TargetError naming `where`."""
    try:
        return msgspec.json.decode(data, type=QualityReport)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise TargetError(f"{where} is not a quality report ({error}); export the model again.") from error
