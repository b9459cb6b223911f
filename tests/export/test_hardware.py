from __future__ import annotations

import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from export.hardware import Gpu, Memory, gpu, memory

GIB = 1 << 30
MEMINFO = (
    "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n"
)


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n" if isinstance(content, int) else str(content))
    return root


def test_a_machine_without_limits_has_what_it_has(tmp_path: Path) -> None:
    assert memory(write(tmp_path, {})) == Memory(16 * GIB, 8 * GIB)


def test_this_machine_has_memory() -> None:
    found = memory()
    assert 0 < found.available_bytes <= found.total_bytes


def test_a_container_s_limit_counts_and_what_the_page_cache_holds_does_not(tmp_path: Path) -> None:
    group = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": "0::/\n",
        f"{group}/memory.max": 4 * GIB,
        f"{group}/memory.current": 3 * GIB,
        f"{group}/memory.stat": f"anon 7\ninactive_file {2 * GIB}\n",
    }
    assert memory(write(tmp_path, files)) == Memory(4 * GIB, 3 * GIB)


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/app.slice"
    files = {
        "proc/self/cgroup": "0::/app.slice/export.scope\n",
        f"{group}/memory.max": 6 * GIB,
        f"{group}/memory.current": 5 * GIB,
        f"{group}/export.scope/memory.max": "max\n",
        f"{group}/export.scope/memory.current": GIB,
    }
    assert memory(write(tmp_path, files)) == Memory(6 * GIB, GIB)


def test_version_1_of_control_groups_is_understood(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/jobs\n4:memory:/jobs/7\n1:name=systemd:/\n0::/\n",
        f"{group}/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000,
        f"{group}/jobs/7/memory.limit_in_bytes": 2 * GIB,
        f"{group}/jobs/7/memory.usage_in_bytes": GIB,
        f"{group}/jobs/7/memory.stat": f"total_inactive_file {GIB // 2}\n",
    }
    assert memory(write(tmp_path, files)) == Memory(2 * GIB, 2 * GIB - GIB // 2)


def test_without_a_driver_there_is_no_gpu() -> None:
    assert gpu("libcuda-that-is-nowhere.so.1") is None


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver library with one device, as ctypes sees it."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "cuda.c").write_text(
        textwrap.dedent("""
            #include <stddef.h>
            int cuInit(unsigned flags) { return DEVICES == 0 ? 100 : 0; }
            int cuDeviceGet(int *device, int ordinal) { *device = 7; return 0; }
            int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 80ull << 30; return device != 7; }
            int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 9 : 0; return 0; }
        """)
    )
    return folder


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(("devices", "expected"), [(1, Gpu(80 * GIB, (9, 0))), (0, None)])
def test_the_driver_is_asked_for_its_first_device(driver: Path, devices: int, expected: Gpu | None) -> None:
    library = driver / f"libcuda{devices}.so"
    command = ["cc", f"-DDEVICES={devices}", "-shared", "-fPIC", "-o", str(library), str(driver / "cuda.c")]
    subprocess.run(command, check=True)
    assert gpu(str(library)) == expected
