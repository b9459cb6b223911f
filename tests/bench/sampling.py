"""Microseconds that one row of logits costs the engine, by what is asked of it and by vocabulary.

    python -m tests.bench.sampling

One thread, no model: rows are normal noise, three times as wide for a model that is sure of a few hundred ids, once
for one that has learnt nothing, which is the worst case of everything that ranks. Prints a Markdown table of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from core.frames import Sampling
from edge_node.engine.logprobs import logprobs
from edge_node.engine.penalties import History
from edge_node.engine.sampling import sample
from edge_node.engine.step import Logits

VOCABULARIES = (49_152, 201_088)
WIDTHS = (3.0, 1.0)
ROWS = 8
PENALISED_IDS = 2000
"""Half of them from the prompt alone."""
BIASED_IDS = 300
TOP_LOGPROBS = 20

Work = Callable[[Logits, int], object]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="times that each of the rows is measured (default 15)")
    rounds = parser.parse_args().rounds
    columns = [(vocabulary, width) for vocabulary in VOCABULARIES for width in WIDTHS]
    medians = [measure(vocabulary, width, rounds) for vocabulary, width in columns]
    names = [f"{vocabulary:,} {'sure' if width > 1 else 'flat'}" for vocabulary, width in columns]
    print(f"| microseconds a row | {' | '.join(names)} |\n|---|{'---|' * len(columns)}")
    for mode in medians[0]:
        print(f"| {mode} | {' | '.join(f'{column[mode]:.0f}' for column in medians)} |")


def measure(vocabulary: int, width: float, rounds: int) -> dict[str, float]:
    """Medians in microseconds, by mode."""
    rows = (np.random.default_rng(1).standard_normal((ROWS, vocabulary)) * width).astype(np.float32)
    return {mode: _median_us(work, rows, rounds) for mode, work in modes(vocabulary)}


def modes(vocabulary: int) -> Iterator[tuple[str, Work]]:
    """Each mode's name and what it does to a row at a position."""
    generator = np.random.default_rng(2)
    history = History(generator.permutation(vocabulary)[: PENALISED_IDS // 2].tolist())
    while len(history.ids) < PENALISED_IDS:
        history.push(int(generator.integers(vocabulary)))
    bias = [(token, 5.0) for token in generator.permutation(vocabulary)[:BIASED_IDS].tolist()]
    half, few = generator.random(vocabulary) < 0.5, generator.random(vocabulary) < 0.001
    penalised = Sampling(0.0, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5)
    everything = replace(penalised, temperature=0.7, top_p=0.95, top_k=40, min_p=0.05, logit_bias=bias)

    def drawn(sampling: Sampling, history: History | None = None, allowed: NDArray[np.bool_] | None = None) -> Work:
        return lambda row, position: sample(row, sampling, vocabulary, 1, position, history, allowed)

    yield "greedy", drawn(Sampling(0.0))
    yield "temperature 1", drawn(Sampling(1.0))
    yield "temperature 0.7, top-p 0.95", drawn(Sampling(0.7, 0.95))
    yield "top-k 40", drawn(Sampling(1.0, 1.0, 40))
    yield "min-p 0.05", drawn(Sampling(1.0, min_p=0.05))
    yield f"greedy, penalties on {PENALISED_IDS:,} ids", drawn(penalised, history)
    yield f"greedy, bias on {BIASED_IDS} ids", drawn(Sampling(0.0, logit_bias=bias))
    yield "temperature 1, half of the ids allowed", drawn(Sampling(1.0), None, half)
    yield "temperature 1, 0.1 % of the ids allowed", drawn(Sampling(1.0), None, few)
    yield f"log-probabilities of {TOP_LOGPROBS}", lambda row, _: logprobs(row, 7, TOP_LOGPROBS, vocabulary)
    yield "temperature, all filters, penalties and bias", drawn(everything, history)


def _median_us(work: Work, rows: Logits, rounds: int) -> float:
    work(rows[0], 0)
    seconds = []
    for position in range(rounds * len(rows)):
        row = rows[position % len(rows)]
        began = time.perf_counter()
        work(row, position)
        seconds.append(time.perf_counter() - began)
    return 1e6 * statistics.median(seconds)


if __name__ == "__main__":
    main()
