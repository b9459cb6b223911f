"""The parent's handle on its engine process: start it by exec, talk to it, see its end.

Does not know why a child is started or killed (edge_node/supervision) nor what the frames mean.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from typing import Protocol

from core.errors import FrameError
from edge_node.runtime.pipe import HEADER_BYTES, MAX_BODY_BYTES, ToChild, ToParent, body_bytes, decode_to_parent, encode

log = logging.getLogger("edge_node.child")

WORKER = "edge_node.runtime.worker"
# What may wait for a child that does not read.
MAX_BACKLOG_BYTES = 2 * MAX_BODY_BYTES
# A child ends on end of file at once; whoever does not is killed.
END_S = 2.0


class EngineProcess(Protocol):
    """What the node needs of an engine process; `Child` is the real one, tests have a fake."""

    @property
    def pid(self) -> int: ...

    @property
    def backed_up(self) -> bool:
        """Whether so much waits to be read that it must get no more requests."""

    def send(self, message: ToChild) -> None:
        """Hand a message over without waiting; one for a process that is gone is lost."""

    async def receive(self) -> ToParent | None:
        """The next message; None once the process has closed its end."""

    def kill(self) -> None:
        """End the process at once."""

    async def end(self) -> str:
        """Hang up, wait for the process (and kill it if it stays); how it ended, as one clause."""


class Child:
    """An exec'd `python -m` WORKER at the other end of a socketpair."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def spawn(cls, log_level: str, worker: str = WORKER) -> Child:
        """Call from the main thread: the child asks to die with the thread that started it. Raises OSError.

        worker: the module to start; it takes the arguments of WORKER.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                command = [sys.executable, "-m", worker, "--fd", str(theirs.fileno())]
                process = subprocess.Popen(
                    [*command, "--parent", str(os.getpid()), "--log-level", log_level],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    # A Ctrl-C on the terminal is for the parent, which lets answers finish first.
                    start_new_session=True,
                )
        except OSError:
            ours.close()
            raise
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def backed_up(self) -> bool:
        return self._writer.transport.get_write_buffer_size() > MAX_BACKLOG_BYTES

    def send(self, message: ToChild) -> None:
        self._writer.write(encode(message))

    async def receive(self) -> ToParent | None:
        try:
            header = await self._reader.readexactly(HEADER_BYTES)
            return decode_to_parent(await self._reader.readexactly(body_bytes(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except FrameError as error:
            log.error("engine_unreadable pid=%d error=%r", self.pid, error.message)
            return None

    def kill(self) -> None:
        self._process.kill()

    async def end(self) -> str:
        self._writer.close()
        try:
            code = await asyncio.to_thread(self._process.wait, END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = await asyncio.to_thread(self._process.wait)
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
