"""Latents as velocity networks see them: (x − mean) / std, a channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diff2to3.errors import InputError

#: {mean, std} of each channel.
Statistics = dict[str, list[float]]


class Normalization(nn.Module):
    """(x − mean) / std of each channel, and the inverse. A training run saves it with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: Mapping[str, Sequence[float]]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(list(statistics["mean"]), dtype=torch.float32))
        self.register_buffer("std", torch.tensor(list(statistics["std"]), dtype=torch.float32))

    @classmethod
    def of(cls, values: Mapping[str, Sequence[float]], channels: int, name: str) -> Normalization:
        """From {mean, std} of a file; InputError where they are missing or do not fit ``channels``."""
        if not isinstance(values, Mapping) or not {"mean", "std"} <= values.keys():
            raise InputError(f"{name}: expected mean and std, got {values!r}")
        mean, std = list(values["mean"]), list(values["std"])
        if len(mean) != channels or len(std) != channels:
            raise InputError(
                f"{name}: expected {channels} means and deviations, got {len(mean)} and {len(std)}"
            )
        if not all(value > 0 for value in std):
            raise InputError(f"{name}: expected positive deviations, got {std}")
        return cls({"mean": mean, "std": std})

    def forward(self, x: Tensor, axis: int = 1) -> Tensor:
        """Channels are dimension ``axis``."""
        return (x - self.along(self.mean, x, axis)) / self.along(self.std, x, axis)

    def invert(self, x: Tensor, axis: int = 1) -> Tensor:
        """What :meth:`forward` was given."""
        return x * self.along(self.std, x, axis) + self.along(self.mean, x, axis)

    def along(self, values: Tensor, x: Tensor, axis: int) -> Tensor:
        """``values`` [C] in the shape and on the device that arithmetic with ``x`` needs."""
        shape = [1] * x.ndim
        shape[axis] = -1
        return values.to(x.device).reshape(shape)

    def statistics(self) -> Statistics:
        """As a file stores it."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}
