"""llama.cpp on a GGUF, measured on request. Run by the interpreter of `make llamacpp`, which has nothing of ours.

    python llamacpp.py MODEL.gguf --threads 2       then a line of JSON on stdin for each measurement:
    {"streams": 8, "tokens": 64, "prompt_tokens": 64}   ->  {"prefill_tokens_s": ..., "decode_tokens_s": ...}

Through the package's own server, without HTTP: continuous batching as its users have it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SLOTS = 8
CONTEXT_TOKENS = 1024
"""Of each slot."""


def open_server(model: str, threads: int) -> Any:
    """Eight slots, no reuse of earlier prompts."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = SLOTS * CONTEXT_TOKENS
    params.n_parallel = SLOTS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    params.cache_ram_mib = 0
    params.verbosity = -1
    return xllamacpp.Server(params)


def measure(server: Any, streams: int, tokens: int, prompt_tokens: int) -> dict[str, float]:
    """Tokens per second while reading (of the first prompt) and of all streams together while writing."""

    def one(stream: int) -> dict[str, float]:
        prompt = [(100 + 31 * stream + at) % 40_000 for at in range(prompt_tokens)]
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        timings: dict[str, float] = server.handle_completions(body)["timings"]
        return timings

    with ThreadPoolExecutor(streams) as pool:
        heard = list(pool.map(one, range(streams)))
    return {
        "prefill_tokens_s": heard[0]["prompt_per_second"],
        "decode_tokens_s": sum(each["predicted_per_second"] for each in heard),
    }


def main() -> None:
    """Load, warm up, answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    server = open_server(options.model, options.threads)
    measure(server, 1, 4, 8)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(server, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
