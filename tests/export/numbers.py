"""Source numbers of every kind for the tests of forms: random, with every odd case that a checkpoint may hold."""

from __future__ import annotations

import numpy as np

from export.forms.values import Blocks, Floats, Mxfp4, Plain

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)


def plain(rows: int = 6, columns: int = 96, seed: int = 1) -> Plain:
    """Normal weights with outliers; one block is zero, one tiny."""
    random = np.random.default_rng(seed)
    weights = random.normal(0, 0.02, (rows, columns)).astype(np.float32)
    weights[random.random(weights.shape) < 0.01] *= 30
    weights[0, :32] = 0
    weights[1, :32] *= np.float32(1e-6)
    return Plain(weights)


def symmetric(bits: int, block: int, rows: int = 6, columns: int = 96, seed: int = 2) -> Blocks:
    """Blocks whose middle code is 0, with float16 scales of either sign: Q4_0, Q8_0."""
    random = np.random.default_rng(seed)
    size = (rows, columns // block)
    scales = _halves(random.normal(0, 0.01, size))
    codes = random.integers(0, 1 << bits, (*size, block), dtype=np.uint8)
    return Blocks(bits, codes, scales, scales * np.float32(-(1 << (bits - 1))))


def q6_k(rows: int = 6, columns: int = 256, seed: int = 3) -> Blocks:
    """Codes of 6 bits in blocks of 16, each scale a float16 times a signed byte."""
    random = np.random.default_rng(seed)
    size = (rows, columns // 16)
    scales = _halves(random.normal(0, 0.001, (rows, 1))) * random.integers(-128, 128, size).astype(np.float32)
    codes = random.integers(0, 64, (*size, 16), dtype=np.uint8)
    return Blocks(6, codes, scales, scales * np.float32(-32))


def q4_1(rows: int = 6, columns: int = 96, seed: int = 4) -> Blocks:
    """Float16 scales and minimums; some scales are 0, some of those minimums too."""
    random = np.random.default_rng(seed)
    size = (rows, columns // 32)
    scales, minimums = _halves(random.uniform(0.001, 0.01, size)), _halves(random.uniform(-0.1, 0, size))
    scales[random.random(size) < 0.2] = 0
    minimums[(scales == 0) & (random.random(size) < 0.5)] = 0
    return Blocks(4, random.integers(0, 16, (*size, 32), dtype=np.uint8), scales, minimums)


def q4_k(rows: int = 6, columns: int = 256, seed: int = 5) -> Blocks:
    """Scales and minimums are a float16 times 6 bits."""
    random = np.random.default_rng(seed)
    size = (rows, columns // 32)
    scales = _halves(random.uniform(0.0005, 0.001, (rows, 1))) * random.integers(0, 64, size).astype(np.float32)
    minimums = -_halves(random.uniform(0.0005, 0.001, (rows, 1))) * random.integers(0, 64, size).astype(np.float32)
    return Blocks(4, random.integers(0, 16, (*size, 32), dtype=np.uint8), scales, minimums)


def mxfp4(rows: int = 6, columns: int = 96, seed: int = 6) -> Mxfp4:
    """Every code, negative zeros too; one block is zero under an exponent that no float type but E8M0 holds."""
    random = np.random.default_rng(seed)
    blocks = columns // 32
    packed = random.integers(0, 256, (rows, blocks, 16), dtype=np.uint8)
    exponents = random.integers(116, 124, (rows, blocks), dtype=np.uint8)
    packed[0, 0] &= 0x88
    exponents[0, 0] = 0
    return Mxfp4(packed, exponents)


def _halves(numbers: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Floats:
    return numbers.astype(np.float16).astype(np.float32)
