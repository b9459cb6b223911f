"""What tests of several packages need from the machine: the small real model, and a Consul."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
