"""Look at every row of logits that an engine in this process samples from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from core.frames import Sampling
from edge_node.engine import answer
from edge_node.engine.penalties import History
from edge_node.engine.sampling import sample
from edge_node.engine.step import Logits


def watch_samples(monkeypatch: pytest.MonkeyPatch, see: Callable[[Logits, int, int], None]) -> None:
    """Have `see` told the logits of known ids, the seed and the position before an id is drawn from them."""

    def watched(
        logits: Logits,
        sampling: Sampling,
        tokenizer_size: int,
        seed: int,
        position: int,
        history: History | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> int:
        see(logits[:tokenizer_size], seed, position)
        return sample(logits, sampling, tokenizer_size, seed, position, history, allowed)

    monkeypatch.setattr(answer, "sample", watched)
