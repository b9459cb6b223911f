"""Where the interpreters of the other exporters are: each has an environment of its own, made by a make target."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def interpreter(name: str) -> Path:
    """The Python of `make <name>`: EDGECHAT_<NAME>_PYTHON, or the one in .venv-<name>; raises LookupError if absent."""
    variable = f"EDGECHAT_{name.upper()}_PYTHON"
    python = Path(os.environ.get(variable) or ROOT / f".venv-{name}/bin/python")
    if not python.is_file():
        raise LookupError(f"There is no {python}: run `make {name}`, or name an interpreter with {variable}.")
    return python


def offline() -> dict[str, str]:
    """The environment for their processes: everything they read lies in folders, so none may ask the hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}
