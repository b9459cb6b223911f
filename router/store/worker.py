"""One thread that does what it is given, the most urgent first. Does not know what that is."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_LAST = 1_000_000
"""Less urgent than everything."""


class Worker:
    """Invariant: one call at a time; of those that wait the most urgent, of these the one that came first.

    A call that never returns keeps no process from ending.
    """

    def __init__(self, name: str) -> None:
        self._waiting: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, urgency: int, call: Callable[[], T]) -> Future[T]:
        """Have it called; the least `urgency` is the most urgent."""
        done: Future[T] = Future()

        def work() -> None:
            try:
                result = call()
            except BaseException as error:  # It is the caller's, whatever it is.
                done.set_exception(error)
            else:
                done.set_result(result)

        self._waiting.put((urgency, next(self._numbers), work))
        return done

    def stop(self, last: Callable[[], T]) -> Future[T]:
        """Have `last` called after all that waits; then the thread ends."""
        done = self.submit(_LAST, last)
        self._waiting.put((_LAST, next(self._numbers), None))
        return done

    def _work(self) -> None:
        while True:
            _, _, work = self._waiting.get()
            if work is None:
                return
            work()
