"""Checkpoint -> quantised ONNX release, verified. Shares only `core` with the services."""

from __future__ import annotations

#: Part of every release's metadata; a change of the written bytes changes it.
EXPORTER_VERSION = "2"
