"""What tests of several packages need from the machine: the small real model, and a Consul."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# No test asserts seconds: an example that the machine was too busy for is no failure.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def _denormals_are_numbers_again() -> Iterator[None]:
    """An ONNX Runtime session that flushes denormals (ours do) leaves the thread that made it flushing.

    Right in an engine process, wrong for whatever is tested next. FE_DFL_ENV, (fenv_t *) -1, undoes it.
    """
    yield
    if sys.float_info.min / 2 == 0:
        ctypes.CDLL(None).fesetenv(ctypes.c_void_p(-1))
        assert sys.float_info.min / 2 > 0


@pytest.fixture(scope="session")
def smollm2_release() -> Path:
    """The folder of a release of the small real model, exported by today's exporter; kept between runs."""
    return output_of(sys.executable, "scripts/build-model", "--out", ".cache/test-releases/smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The checkpoint that release is made from."""
    return ROOT / output_of(sys.executable, "scripts/get-model")


@pytest.fixture(scope="session")
def consul_binary() -> Path:
    """The Consul to test with: CONSUL, the one on PATH, or what `make consul` fetched."""
    try:
        return output_of("scripts/find-consul")
    except subprocess.CalledProcessError:
        pytest.fail("There is no Consul to test with: run `make consul`, or name one with CONSUL=/path/to/consul.")


def output_of(*command: str) -> Path:
    """Run one of our scripts, which prints a path; what it says on stderr is shown if it fails."""
    return Path(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
