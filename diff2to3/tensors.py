"""Tensors on disk: safetensors files, read and written in one place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.files import write_atomic


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; InputError for a missing, truncated or foreign file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a complete safetensors file: {error}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file atomically; returns its SHA-256."""
    plain = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    data = safetensors.torch.save(plain)
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def half_tensors(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The floating-point tensors of the network ``name`` as float16, the others as they are.

    Raises InputError for a finite number that float16 cannot hold.
    """
    found = {}
    for key, value in tensors.items():
        half = value.half() if value.is_floating_point() else value
        if not bool(torch.isfinite(half).all()) and bool(torch.isfinite(value).all()):
            raise InputError(f"{name}: {key!r} has numbers that float16 cannot hold")
        found[key] = half
    return found
