"""onnxruntime-genai on its own builder's graph, measured on request. Run by the interpreter of `make genai`.

    python genai.py FOLDER --threads 2              then a line of JSON on stdin for each measurement:
    {"streams": 8, "tokens": 64, "prompt_tokens": 64}   ->  {"prefill_tokens_s": ..., "decode_tokens_s": ...}

Its batch is static: all prompts have one length and are read together.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

og: Any = importlib.import_module("onnxruntime_genai")


def set_threads(folder: Path, threads: int) -> None:
    """The builder leaves this to ONNX Runtime; spinning stays as it is shipped."""
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config, indent=4))


def measure(model: Any, streams: int, tokens: int, prompt_tokens: int) -> dict[str, float]:
    """Tokens per second of all streams together, while reading and while writing."""
    params = og.GeneratorParams(model)
    length = prompt_tokens + tokens
    params.set_search_options(batch_size=streams, max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, params)
    prompts = (100 + 31 * np.arange(streams)[:, None] + np.arange(prompt_tokens)) % 40_000
    began = time.perf_counter()
    generator.append_tokens(prompts.astype(np.int32))
    generator.generate_next_token()
    read = time.perf_counter()
    for _ in range(tokens - 1):
        generator.generate_next_token()
    wrote = time.perf_counter()
    return {
        "prefill_tokens_s": streams * prompt_tokens / (read - began),
        "decode_tokens_s": streams * (tokens - 1) / (wrote - read),
    }


def main() -> None:
    """Load, warm up, answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    set_threads(options.folder, options.threads)
    model = og.Model(str(options.folder))
    measure(model, 1, 4, 8)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(model, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
