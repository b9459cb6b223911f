"""Become another program, after asking the kernel to kill it when its parent dies.

    python -m scripts.supervisor.child PARENT_PID PROGRAM ARGUMENT...

The request survives exec, and is made here, after this process's own exec, because code between fork and exec
(`preexec_fn`) can deadlock in a parent with threads. It binds to the *thread* that started this process: start
it from the parent's main thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def become(parent_pid: int, argv: list[str]) -> int:
    """Exec `argv`; returns an exit status only if that is impossible or the parent is gone already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        print(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return 1
    if os.getppid() != parent_pid:  # it died before the request was made, so no signal will come
        return 1
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"cannot run {argv[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(become(int(sys.argv[1]), sys.argv[2:]))
