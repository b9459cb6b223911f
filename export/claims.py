"""What a recipe promises about its weights, and the check that the written bytes keep the promise.

gguf-exact   The written code, scale and correction stand for the same real number as the source's code * d + m. Both
             sides are evaluated in float64, where neither rounds, and compared bit for bit.
gguf-parity  The kernel's float32 weight (code - z) * d differs from code * d + m by at most 2**-23 (|code d| + 2 |m|):
             one rounding each of z, of the difference and of the product. Symmetric matrices stay exact.

Does not know files or graphs.
"""

from __future__ import annotations

import numpy as np

from export.errors import SourceError
from export.layouts import Corrected, Layout, Symmetric, ZeroPointed
from export.quantize import Blocks
from export.recipes import Recipe

_ROUNDING = 2.0**-23
_ROWS_AT_ONCE = 4096


def weights_claim(recipe: Recipe) -> str:
    """The promise as it stands in the manifest."""
    match recipe:
        case Recipe.GGUF_EXACT:
            return "every written weight equals the source's code * d + m as a real number (compared in float64)"
        case Recipe.GGUF_PARITY:
            return "every written weight is within 2**-23 * (|code * d| + 2 * |m|) of the source's code * d + m"


def check(name: str, source: Blocks, written: Layout) -> None:
    """Raise SourceError unless the written matrix `name` keeps its promise; slice by slice, in little memory."""
    broken = 0
    for start in range(0, source.codes.shape[0], _ROWS_AT_ONCE):
        stop = start + _ROWS_AT_ONCE
        broken += _count_broken(source.rows(start, stop), written.rows(start, stop))
    if broken:
        raise SourceError(
            f"{broken} weights of {name!r} cannot be carried over as the recipe promises; the source holds scales that "
            "are too far apart, take another GGUF."
        )


def _count_broken(source: Blocks, written: Layout) -> int:
    expected, found = source.to_doubles(), written.to_doubles()
    match written:
        case Symmetric() | Corrected():
            return int(np.count_nonzero(expected != found))
        case ZeroPointed():
            minimums = np.abs(source.minimums[..., None].astype(np.float64))
            products = source.codes * np.abs(source.scales[..., None].astype(np.float64))
            bound = _ROUNDING * (products + 2 * minimums).reshape(expected.shape)
            return int(np.count_nonzero(~(np.abs(found - expected) <= bound)))
