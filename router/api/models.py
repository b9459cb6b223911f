"""`/v1/models` as the SDK's `types.Model`."""

from __future__ import annotations

from typing import Any

from core.errors import UnknownModel


def model_object(name: str) -> dict[str, Any]:
    """created: 0, because an alias outlives its releases."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "edgechat"}


def model_list(names: list[str]) -> dict[str, Any]:
    return {"object": "list", "data": [model_object(name) for name in names]}


def one_model(name: str, names: list[str]) -> dict[str, Any]:
    """Raises UnknownModel."""
    if name not in names:
        raise UnknownModel(name, names)
    return model_object(name)
