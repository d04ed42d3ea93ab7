"""The exponential moving average of the weights, on the shards that a process holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay of the update after step ``step`` (from 0): min(decay, (1 + step) / (10 + step)) with
    warm-up."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class Averager:
    """average <- d average + (1 - d) weights, after every step."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float, warmup: bool = True) -> None:
        """``weights``: the trained tensors (a process's shards of them), which stay referenced."""
        self.decay, self.warmup = decay, warmup
        self._weights = dict(weights)
        self.tensors = {name: value.detach().clone() for name, value in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step ``step``."""
        weight = 1.0 - decay_at(step, self.decay, self.warmup)
        torch._foreach_lerp_(list(self.tensors.values()), list(self._weights.values()), weight)

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.tensors.items():
            current = self._weights[name].clone()
            self._weights[name].copy_(average)
            average.copy_(current)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in the place of the weights; on leaving, both are as before, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()
