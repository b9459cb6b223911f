"""Look at the machine before a fleet is started on it: free ports, a Consul binary, the link secret."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from scripts.supervisor.plan import (
    HOST,
    LAST_OFFSET,
    Discovery,
    ForeignConsul,
    OwnConsul,
    PlanError,
    Process,
    consul_address,
    consul_version,
)

SECRET_BYTES = 32


def find_discovery(root: Path, environment: Mapping[str, str]) -> Discovery:
    """Choose a running Consul (CONSUL_HTTP_ADDR), else a binary (CONSUL, PATH, .tools/), else none.

    Raises PlanError when what was named explicitly cannot be used.
    """
    if address := environment.get("CONSUL_HTTP_ADDR"):
        return ForeignConsul(consul_address(address))
    found = subprocess.run([root / "scripts/find-consul"], capture_output=True, text=True, check=False)
    if found.returncode == 2:
        raise PlanError(found.stderr.strip())
    binary = found.stdout.strip()
    if not binary:
        return None
    try:
        words = subprocess.run([binary, "version"], capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PlanError(f"{binary} does not run ({error}): name another Consul with CONSUL=/path/to/consul.") from error
    return OwnConsul(binary, consul_version(words))


def check_ports(processes: Iterable[Process], port: int) -> None:
    """Raise PlanError, naming a way out, if a port that the fleet needs is taken."""
    for process in processes:
        for needed in process.ports:
            if (code := bind_error(needed)) is None:
                continue
            if code != errno.EADDRINUSE:
                problem = f"port {needed} (for {process.name}) cannot be opened ({os.strerror(code)})"
                raise PlanError(f"{problem}: choose other ports, above 1023, e.g. PORT=8080 make up.")
            free = next((base for base in range(port + 20, 65535 - LAST_OFFSET, 20) if is_free(base)), None)
            hint = f", or choose other ports, e.g. PORT={free} make up" if free else ""
            raise PlanError(f"port {needed} (for {process.name}) is taken: stop what listens there{hint}.")


def is_free(base: int) -> bool:
    """Tell whether a fleet would find all its ports free above `base`."""
    return all(bind_error(base + offset) is None for offset in range(LAST_OFFSET + 1))


def bind_error(port: int) -> int | None:
    """Try to listen on a port of loopback; return the errno of the refusal, or None."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is no obstacle
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError as error:
            return error.errno
    return None


def make_secret(path: Path) -> None:
    """Write a fresh link secret unless there is one; readable by its owner only, never seen half written."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(SECRET_BYTES) + "\n")
    try:
        with contextlib.suppress(FileExistsError):  # another supervisor was first: its secret counts
            os.link(fresh, path)
    finally:
        fresh.unlink()
