"""Whether this version of the node can serve a release, decided from its manifest alone."""

from __future__ import annotations

from typing import Literal

from core.errors import ReleaseError
from core.manifest import Manifest


def check_servable(manifest: Manifest, device: Literal["cpu", "cuda"]) -> None:
    """Raise ReleaseError, saying what to do, for a release that cannot be served on this device."""
    if manifest.device != device:
        raise ReleaseError(
            f"{manifest.release} ({manifest.variant}) is laid out for {manifest.device}, this node's device is "
            f"{device}; export it with a {device} recipe or set engine.device to {manifest.device!r}."
        )
    if manifest.operators:
        raise ReleaseError(
            f"{manifest.release} ({manifest.variant}) needs the operator {manifest.operators[0]}, which this version "
            "does not have; export it with another recipe."
        )
