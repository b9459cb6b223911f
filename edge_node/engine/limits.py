"""What an operator allows the engine."""

from __future__ import annotations

import msgspec


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one engine.

    slots: sequences that run at once. context_tokens: positions of a slot, at least 2. max_waiting:
    sequences that may wait for a slot. chunk_tokens: the longest prompt chunk of a step.
    max_stall_ms: the longest chunk while others are being answered; 0 = two decode steps, at least 50 ms.
    prefix_blocks: size of the prefix store, 0 = nothing is reused. speculation: whether drafts are tried.
    failover_exact_s: an answer is continued exactly when computing its given ids one by one takes less; 0 = only one
    that must be exact.
    """

    slots: int
    context_tokens: int
    max_waiting: int
    chunk_tokens: int = 256
    max_stall_ms: float = 0.0
    prefix_blocks: int = 0
    speculation: bool = False
    failover_exact_s: float = float("inf")
