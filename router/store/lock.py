"""One router per file: a lock that its holder's death releases. Does not know what the file holds."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from core.errors import StoreUnavailable

_CLEAN = b"clean\n"


class FileLock:
    """`<path>.lock`, held from `take` to `release`; it lies there for ever, with the holder's process id in it.

    was_left_clean: whether the last holder gave it back and said so; nobody knows what a killed one left.
    """

    def __init__(self, path: Path) -> None:
        # A link to the file is the same file.
        self._guarded = path.resolve()
        self._path = self._guarded.with_name(self._guarded.name + ".lock")
        self._descriptor: int | None = None
        self.was_left_clean = False

    def take(self) -> None:
        """Raises StoreUnavailable if somebody else holds it, OSError if there can be no such file."""
        self.release()
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.was_left_clean = os.pread(descriptor, 20, 0) == _CLEAN
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise StoreUnavailable(
                f"The store {self._guarded} is in use by another router (pid {holder or 'unknown'}); "
                "stop that one, or name another file in store.path."
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self, *, clean: bool = False) -> None:
        """Let the next one have it; `clean`: nothing is left for it to tidy up."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                if clean:
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, _CLEAN, 0)
            finally:
                os.close(descriptor)
