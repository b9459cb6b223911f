from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export.errors import TargetError
from export.trial import child

# Whatever starts the tests in the background may have them ignore interrupts.
_SLEEPER = """
import signal
from export.trial import child
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    child.call(exec, "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
"""


def test_a_call_is_made_in_another_process() -> None:
    assert child.call(os.getpid) != os.getpid()
    assert child.call(int, "7") == 7


def test_what_a_call_raises_in_its_process_is_raised_here() -> None:
    with pytest.raises(json.JSONDecodeError):
        child.call(json.loads, "{")


def test_a_process_that_is_killed_for_its_memory_is_one_sentence() -> None:
    with pytest.raises(child.OutOfMemory, match=r"^The process started to raise signal was killed by the system, "):
        child.call(signal.raise_signal, signal.SIGKILL)


def test_a_process_that_crashes_is_one_sentence() -> None:
    with pytest.raises(TargetError, match=r"^The process started to abort ended by SIGABRT before it had answered"):
        child.call(os.abort)


def test_a_process_that_leaves_is_one_sentence() -> None:
    with pytest.raises(TargetError, match="ended with exit code 3 before it had answered"):
        child.call(os._exit, 3)


def test_when_memory_runs_out_the_child_goes_first() -> None:
    assert child.call(Path("/proc/self/oom_score_adj").read_text) == "1000\n"


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGKILL])
def test_the_process_ends_with_its_caller(ended_by: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as caller:
        assert caller.stdout is not None
        pid = int(caller.stdout.readline())
        caller.send_signal(ended_by)
        caller.wait()
    deadline = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may lie about until somebody asks for it."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
