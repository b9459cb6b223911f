"""The engine process of tests/tools/scripted_node: the real one, but for its sampler, which follows a script.

SCRIPT_PACE_S in the environment is how long it takes over every id, so that a test can be in time for a part of it.
Beside that it prints `resident KEY N` for what it tells its node of prefixes, N in tokens, so that a test can wait
until an idle node has re-read a conversation.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from core.frames import Sampling
from core.manifest import Manifest
from edge_node.engine import answer, sampling, speech
from edge_node.engine.engine import Engine
from edge_node.engine.step import Logits
from edge_node.runtime import worker
from tests.tools.harmony_script import Noise, Script, line_of


def main() -> int:
    """What the worker's own `main` does, with other functions in three places."""
    # setattr, because these names are not their modules' to mypy.
    setattr(speech, "open_speech", _open_speech)  # noqa: B010
    setattr(Engine, "take_chains", _take_chains)  # noqa: B010
    return worker.main()


_own_open_speech, _own_take_chains = speech.open_speech, Engine.take_chains


def _open_speech(manifest: Manifest, read_text: Callable[[str], str]) -> speech.Speech:
    """The release's own speech, and a sampler that follows the script in it."""
    opened = _own_open_speech(manifest, read_text)
    assert isinstance(opened, speech.HarmonySpeech)
    script, size = Script(opened), manifest.tokenizer_size
    choices, pace_s = script.choices(size), float(os.environ.get("SCRIPT_PACE_S", "0"))

    def sample(logits: Logits, asked: Sampling, known: int, seed: int, position: int, *more: Any) -> int:
        time.sleep(pace_s)
        wanted = line_of(script, seed)[position]
        if not isinstance(wanted, Noise):
            return wanted
        masked = np.where(choices[wanted], logits[:size], -np.inf).astype(logits.dtype)
        return sampling.sample(masked, asked, known, seed, position, *more)

    setattr(answer, "sample", sample)  # noqa: B010
    return opened


def _take_chains(engine: Engine) -> list[tuple[str, int]]:
    chains = _own_take_chains(engine)
    for key, tokens in chains:
        print(f"resident {key} {tokens}", file=sys.stderr, flush=True)
    return chains


if __name__ == "__main__":
    sys.exit(main())
