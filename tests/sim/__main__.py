"""Run simulations by hand: `python -m tests.sim --seed 123 --trace`, or `--from 0 --count 1000`."""

from __future__ import annotations

import argparse
import time
import traceback
from collections import Counter

from tests.sim.simulation import simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="this one")
    parser.add_argument("--trace", action="store_true", help="tell everything that happens in it")
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first of many")
    parser.add_argument("--count", type=int, default=1000, help="how many")
    parser.add_argument("--stop", action="store_true", help="at the first that fails")
    asked = parser.parse_args()
    if asked.seed is not None:
        for what, times in sorted(simulate(asked.seed, print if asked.trace else None).items()):
            print(f"{times:8d}  {what}")
        return 0
    return many(asked.first, asked.count, asked.stop)


def many(first: int, count: int, stop: bool) -> int:
    """How many of the seeds fail; says which, and why."""
    counts: Counter[str] = Counter()
    failed = 0
    began_s = time.perf_counter()
    for seed in range(first, first + count):
        try:
            counts += simulate(seed)
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"seed {seed}: {type(error).__name__}: {error} ({where.name}, line {where.lineno})")
            if stop:
                break
    took_s = time.perf_counter() - began_s
    for what, times in sorted(counts.items()):
        print(f"{times:8d}  {what}")
    print(f"{failed} of {count} failed; {took_s / count * 1000:.0f} ms each")
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
