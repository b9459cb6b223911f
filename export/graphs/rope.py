"""The cosines and sines that attention rotates queries and keys by, for every kind of scaling that checkpoints name.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071) and, where these leave something open (the ends of
YaRN's ramp, Llama 3.1's passage), transformers' `modeling_rope_utils`, which the checkpoints were made for.
Does not know models, graphs or files.
"""

from __future__ import annotations

from math import ceil, floor, log, pi

import numpy as np

from export.errors import SourceError
from export.forms.values import Doubles, Floats
from export.spec import Divided, Linear, Llama3, Rope, Yarn

#: Numbers that are worked out at a time: in float64, whole tables would be twice as large as what is kept.
_SLICE_NUMBERS = 1 << 20


def rotary_tables(rope: Rope, head_dim: int, context_tokens: int) -> tuple[Floats, Floats]:
    """Cosines and sines [context_tokens, head_dim / 2], computed in float64 and rounded once.

    Raises SourceError if they are not finite.
    """
    radians = frequencies(rope, head_dim)
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, Yarn) else 1.0
    cosines = np.empty((context_tokens, len(radians)), np.float32)
    sines = np.empty_like(cosines)
    step = max(1, _SLICE_NUMBERS // len(radians))
    for start in range(0, context_tokens, step):
        positions = slice(start, min(start + step, context_tokens))
        angles = np.arange(positions.start, positions.stop)[:, None] * radians
        with np.errstate(invalid="ignore", over="ignore"):  # what comes of it is refused below
            cosines[positions] = np.cos(angles) * factor
            sines[positions] = np.sin(angles) * factor
        if not (np.isfinite(cosines[positions]).all() and np.isfinite(sines[positions]).all()):
            raise SourceError(
                "The model's rotary embedding has cosines and sines that are not finite; check the rope settings of "
                "its configuration, or fetch it again."
            )
    return cosines, sines


def frequencies(rope: Rope, head_dim: int) -> Doubles:
    """Radians per position [head_dim / 2], highest first."""
    plain: Doubles = rope.base ** (-np.arange(0, head_dim, 2) / head_dim)
    match rope.scaling:
        case None:
            return plain
        case Linear(factor=factor):
            return plain / factor
        case Divided(divisors=divisors):
            return plain / np.array(divisors, np.float64)
        case Llama3():
            return _mix(plain, rope.scaling.factor, _llama3_kept(plain, rope.scaling))
        case Yarn():
            return _mix(plain, rope.scaling.factor, _yarn_kept(rope.base, head_dim, rope.scaling))


def _mix(plain: Doubles, factor: float, kept: Doubles) -> Doubles:
    """Frequencies between `plain / factor` (kept 0) and `plain` (kept 1)."""
    mixed: Doubles = plain / factor * (1 - kept) + plain * kept
    return mixed


def _llama3_kept(plain: Doubles, scaling: Llama3) -> Doubles:
    """1 for what turns at least `high_factor` times within the original context, 0 below `low_factor` times."""
    turns = scaling.original_context_tokens * plain / (2 * pi)
    kept: Doubles = np.clip((turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor), 0, 1)
    return kept


def _yarn_kept(base: float, head_dim: int, scaling: Yarn) -> Doubles:
    """1 up to the pair that turns `beta_fast` times within the original context, 0 from that of `beta_slow` on."""

    def pair_turning(times: float) -> float:
        return head_dim * log(scaling.original_context_tokens / (times * 2 * pi)) / (2 * log(base))

    first, last = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # A ramp without length would divide by zero; transformers gives it this one.
    length = last - first if last != first else 0.001
    kept: Doubles = 1 - np.clip((np.arange(head_dim // 2) - first) / length, 0, 1)
    return kept
