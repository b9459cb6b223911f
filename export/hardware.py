"""What this machine has to run a release with: memory, and NVIDIA's GPUs.

Sources: /proc/meminfo; memory limits of control groups (Linux: admin-guide/cgroup-v1/memory, cgroup-v2), which count
where a container is smaller than its machine; CUDA's driver library, asked through ctypes, so that no CUDA package is
needed. Does not know recipes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT_BYTES = 1 << 60
"""Version 1 of control groups writes "no limit" as a very large number."""


@dataclass(frozen=True)
class Memory:
    """Bytes that this process may use at most, and that are free for it now."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Gpu:
    """The first CUDA device: its memory, its compute capability as (major, minor)."""

    memory_bytes: int
    capability: tuple[int, int]


def memory(root: Path = Path("/")) -> Memory:
    """This machine's memory, or its control group's where that is less."""
    machine = _meminfo(root / "proc/meminfo")
    total, available = machine["MemTotal"], machine["MemAvailable"]
    for limit, used in _limits(root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return Memory(total, available)


def gpu(library: str = "libcuda.so.1") -> Gpu | None:
    """The first CUDA device; None where there is no driver or no device."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    device, size = ctypes.c_int(), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    calls: tuple[Callable[[], int], ...] = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
    )
    if any(call() != 0 for call in calls):  # in this order; the first that fails ends it
        return None
    return Gpu(size.value, (major.value, minor.value))


def _meminfo(path: Path) -> dict[str, int]:
    """Bytes by name."""
    fields = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if len(words) == 3 and words[2] == "kB"}


def _limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used without what could be dropped at once) of every control group above this process that has one."""
    found = []
    for base, limit_name, used_name, cache_name in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _groups(root, root / base, "memory" if base.endswith("memory") else ""):
            limit = _number(folder / limit_name)
            if limit is not None and limit < _NO_LIMIT_BYTES:
                used = (_number(folder / used_name) or 0) - _statistic(folder / "memory.stat", cache_name)
                found.append((limit, max(0, used)))
    return found


def _groups(root: Path, base: Path, controller: str) -> list[Path]:
    """The control group of this process and those above it. controller "": version 2, whose line names none."""
    listed = root / "proc/self/cgroup"
    lines = listed.read_text().splitlines() if listed.is_file() else []
    folders = [base]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            parts = [part for part in path.split("/") if part not in ("", "..")]
            folders += [base.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return folders


def _number(path: Path) -> int | None:
    """The number in a file; None for a missing file or the word "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
