"""Calls that break the kernels' contract, to see that the sanitizers notice. Not part of the usual cases."""

from __future__ import annotations

import torch

from diff2to3.kernels import library


def too_short(generator: torch.Generator) -> str:
    """Ten keys, of which the kernel is told that there are a thousand."""
    keys, order = torch.arange(10), torch.empty(10, dtype=torch.int32)
    library.call("sort_keys", keys, order, 1000, device=keys.device)
    return "unnoticed"


CASES = [too_short]
