"""Random numbers for the fuzz cases: sizes, and tensors with a few hostile entries."""

from __future__ import annotations

import torch
from torch import Tensor

#: Finite numbers at the ends of what float32 holds, where products overflow and differences vanish.
EXTREMES = (0.0, -0.0, 1e-45, -1e-38, 1e-20, 1e-7, 1.0, -1.0, 1e7, -1e7, 1e18, 1e30, -1e30, 3.4e38, -3.4e38)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


def integer(generator: torch.Generator, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def choice(generator: torch.Generator, options: tuple) -> object:  # type: ignore[type-arg]
    return options[integer(generator, 0, len(options) - 1)]


def chance(generator: torch.Generator, probability: float) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def spoil(generator: torch.Generator, tensor: Tensor, values: tuple[float, ...], share: float) -> Tensor:
    """A copy with about ``share`` of the entries replaced by one of ``values`` each."""
    picked = torch.rand(tensor.shape, generator=generator) < share
    index = torch.randint(len(values), tensor.shape, generator=generator)
    return torch.where(picked, torch.tensor(values, dtype=tensor.dtype)[index], tensor)
