"""One call in a process of its own, started afresh.

Libraries that compute keep memory, threads and rounding modes when they are done; a process that has ended keeps
nothing. Not concurrent.futures: its pool hides how the process ended, and on an interrupt it waits for it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from export.errors import TargetError

_PR_SET_PDEATHSIG = 1

Result = TypeVar("Result")


class OutOfMemory(TargetError):
    """The system killed the process, as it does to the one that takes the most memory."""


def call(work: Callable[..., Result], *arguments: object) -> Result:
    """`work(*arguments)`, all of them picklable, in a new process.

    What `work` raises is raised here. Raises OutOfMemory or TargetError if the process ends before it has answered.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, os.getpid(), work, arguments))
    process.start()
    sender.close()
    try:
        outcome: Result | Exception = receiver.recv()
    except EOFError:
        process.join()
        raise _ended(work.__name__, process.exitcode) from None
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
        receiver.close()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _answer(sender: Connection, parent: int, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both: the parent ends this process
    _end_with(parent)
    # If memory runs out, then this process goes, not what else runs here.
    Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        outcome: object = work(*arguments)
    except Exception as error:
        outcome = error
    sender.send(outcome)


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it is gone; prctl(2)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit


def _ended(name: str, code: int | None) -> TargetError:
    purpose = name.strip("_").replace("_", " ")
    if code == -signal.SIGKILL:
        return OutOfMemory(
            f"The process started to {purpose} was killed by the system, most likely because memory ran out; "
            "free some, or use a larger machine."
        )
    how = f"with exit code {code}" if code is None or code >= 0 else f"by {signal.Signals(-code).name}"
    return TargetError(
        f"The process started to {purpose} ended {how} before it had answered; what it said is above, if it said "
        "anything."
    )
