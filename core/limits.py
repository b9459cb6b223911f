"""Limits of a request that the router refuses by and a node keeps to, said once."""

from __future__ import annotations

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 256
"""Of each stop string."""

MAX_SCHEMA_BYTES = 128 * 1024
MAX_SCHEMA_DEPTH = 100

MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 20
