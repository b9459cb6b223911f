from __future__ import annotations

import tracemalloc
from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import pytest

from export.errors import SourceError
from export.graphs.rope import frequencies, rotary_tables
from export.spec import Divided, Linear, Llama3, Rope, Scaling, Yarn

GPT_OSS = Rope(150_000.0, Yarn(32.0, 4096, 32.0, 1.0, truncate=False, attention_factor=0.1 * log(32) + 1))
"""The values of openai/gpt-oss-20b's config.json."""

LLAMA_3_1 = Rope(500_000.0, Llama3(8.0, 1.0, 4.0, 8192))
"""The values of Llama 3.1's config.json."""


def theirs(kind: str, head_dim: int, base: float, **parameters: Any) -> tuple[np.ndarray[Any, Any], float]:
    """transformers' frequencies, in float32, and its factor on cosines and sines."""
    from transformers import LlamaConfig  # takes seconds: only for the tests that ask for it
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": kind, "rope_theta": base, **parameters}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=131_072, rope_parameters=rope)
    found, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return found.double().numpy(), factor


@pytest.mark.parametrize(
    ("scaling", "kind", "parameters"),
    [
        (Linear(4.0), "linear", {"factor": 4.0}),
        (
            Llama3(8.0, 1.0, 4.0, 8192),
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            Yarn(32.0, 4096, 32.0, 1.0, truncate=False, attention_factor=0.1 * log(32) + 1),
            "yarn",
            {
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
        ),
        (
            Yarn(4.0, 512, 16.0, 2.0, truncate=True, attention_factor=1.25),
            "yarn",
            {
                "factor": 4.0,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "original_max_position_embeddings": 512,
                "attention_factor": 1.25,
            },
        ),
    ],
)
@pytest.mark.parametrize(("head_dim", "base"), [(64, 150_000.0), (128, 500_000.0), (18, 10_000.0)])
def test_every_scaling_has_the_frequencies_and_the_factor_of_transformers(
    scaling: Scaling, kind: str, parameters: dict[str, Any], head_dim: int, base: float
) -> None:
    expected, factor = theirs(kind, head_dim, base, **parameters)
    rope = Rope(base, scaling)
    np.testing.assert_allclose(frequencies(rope, head_dim), expected, rtol=2e-6)
    # At position 0 the cosine is the factor alone.
    assert rotary_tables(rope, head_dim, 1)[0][0, 0] == pytest.approx(factor, rel=1e-7)


def test_a_plain_rope_turns_each_pair_slower_than_the_one_before() -> None:
    np.testing.assert_array_equal(frequencies(Rope(100.0), 4), [1, 0.1])


def test_divisors_slow_down_each_frequency_by_its_own() -> None:
    divided = replace(LLAMA_3_1, scaling=None)
    divisors = frequencies(divided, 128) / frequencies(LLAMA_3_1, 128)
    assert divisors[0] == 1
    assert divisors[-1] == pytest.approx(8)
    rope = replace(LLAMA_3_1, scaling=Divided(tuple(divisors)))
    np.testing.assert_allclose(frequencies(rope, 128), frequencies(LLAMA_3_1, 128), rtol=1e-15)


def test_a_ramp_without_length_is_a_step() -> None:
    scaling = Yarn(2.0, 1000, 4.0, 4.0, truncate=False, attention_factor=1.0)
    kept = frequencies(Rope(10_000.0, scaling), 64) / frequencies(Rope(10_000.0), 64)
    assert set(np.round(kept, 12)) == {0.5, 1.0}


@pytest.mark.parametrize("rope", [Rope(10_000.0), LLAMA_3_1, GPT_OSS])
def test_tables_are_the_real_cosines_and_sines_rounded_once(rope: Rope) -> None:
    cosines, sines = rotary_tables(rope, 64, 5000)
    assert cosines.shape == sines.shape == (5000, 32)
    assert cosines.dtype == sines.dtype == np.float32
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, Yarn) else 1
    angles = 4999 * frequencies(rope, 64)  # an angle worked out in float32 would be off by 1e-4 here
    np.testing.assert_allclose(cosines[-1], np.cos(angles) * factor, atol=1e-7, rtol=0)
    np.testing.assert_allclose(sines[-1], np.sin(angles) * factor, atol=1e-7, rtol=0)
    np.testing.assert_allclose(np.hypot(cosines, sines), factor, rtol=1e-6)


@pytest.mark.parametrize("rope", [LLAMA_3_1, GPT_OSS])
def test_tables_in_slices_are_the_tables_at_once_bit_for_bit(rope: Rope) -> None:
    angles = np.arange(70_001)[:, None] * frequencies(rope, 64)
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, Yarn) else 1.0
    cosines, sines = rotary_tables(rope, 64, 70_001)
    np.testing.assert_array_equal(cosines, (np.cos(angles) * factor).astype(np.float32))
    np.testing.assert_array_equal(sines, (np.sin(angles) * factor).astype(np.float32))


def test_a_long_context_takes_little_more_memory_than_its_tables() -> None:
    tracemalloc.start()
    try:
        tables = rotary_tables(GPT_OSS, 64, 1 << 19)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - sum(table.nbytes for table in tables) < 64 << 20  # a table in float64: 128 MiB


def test_tables_that_are_not_finite_are_refused() -> None:
    endless = Rope(10_000.0, Yarn(2.0, 1000, 32.0, 1.0, truncate=True, attention_factor=1e300))
    with pytest.raises(SourceError, match="not finite"):
        rotary_tables(endless, 64, 10)
