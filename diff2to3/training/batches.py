"""Batches of any task: moving them to a device, and writing them to a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it on ``device``: tensors, dataclasses, dicts, lists, tuples, nested."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved = {
            f.name: to_device(getattr(value, f.name), device) for f in dataclasses.fields(value) if f.init
        }
        return dataclasses.replace(value, **moved)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value


def tensors_in(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor in ``value`` under its path: "voxels.feats", "views.target.images", "items.0"."""
    if isinstance(value, Tensor):
        return {name or "tensor": value}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif isinstance(value, Mapping):
        children = {str(key): item for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        children = {str(i): item for i, item in enumerate(value)}
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, child in children.items():
        found.update(tensors_in(child, f"{name}.{key}" if name else key))
    return found
