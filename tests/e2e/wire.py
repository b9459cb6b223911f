"""A wire between two processes that can be cut, or made to fall silent. Knows bytes only.

whole    every byte is passed on
cut      what is connected is reset, and so is whoever connects
silent   connections stay, but nothing passes and nobody is told; what was sent meanwhile arrives once it is whole
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal, TypeAlias

HOST = "127.0.0.1"
CHUNK_BYTES = 64 * 1024
RESET_AT_ONCE = struct.pack("ii", 1, 0)
LIMIT_S = 10.0

State: TypeAlias = Literal["whole", "cut", "silent"]


class Wire:
    """Invariant: `port` listens from the beginning until `close`, whatever becomes of the other end.

    target: the port of loopback that bytes go to, asked for every connection. Any thread may call.
    """

    def __init__(self, target: Callable[[], int]) -> None:
        self._target = target
        self._state: State = "whole"
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._passing = asyncio.Event()
        self._passing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Reset everything, and whoever connects until `heal`."""
        self._become("cut")

    def reset(self) -> None:
        """Reset what is connected; whoever connects then gets through."""
        self.cut()
        self.heal()

    def silence(self) -> None:
        """Pass nothing on, in either direction, until `heal`."""
        self._become("silent")

    def heal(self) -> None:
        """Pass everything on; does nothing if the wire is whole."""
        self._become("whole")

    def close(self) -> None:
        """End it; does nothing the second time."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()
            self._loop.close()

    def _become(self, state: State) -> None:
        async def become() -> None:
            self._state = state
            if state == "silent":
                self._passing.clear()
            else:
                self._passing.set()
            if state == "cut":
                for writer in list(self._writers):
                    _reset(writer)

        asyncio.run_coroutine_threadsafe(become(), self._loop).result(LIMIT_S)

    # -- on the thread -------------------------------------------------------------------------

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._on_connection, sock=self._listener)
        await self._closing.wait()
        server.close()
        self._passing.set()
        for writer in list(self._writers):
            _reset(writer)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _on_connection(self, near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        if self._state == "cut":
            _reset(to_near)
            return
        try:
            far, to_far = await asyncio.open_connection(HOST, self._target())
        except OSError:
            _reset(to_near)
            return
        self._writers |= {to_near, to_far}
        try:
            await asyncio.gather(self._pass_on(near, to_far), self._pass_on(far, to_near))
        finally:
            self._writers -= {to_near, to_far}

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                await self._passing.wait()
                sink.write(data)
                await sink.drain()
        sink.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """An RST, not a FIN: the other side learns at once that nothing more comes."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_ONCE)
    writer.transport.abort()
