"""Conditional flow matching (P3.3): the path from data to noise, the times it is learnt at, and the loss.

    z_t = (1 − t) z_0 + t ε        u = dz_t/dt = ε − z_0        loss = mean ‖v_θ(z_t, t, image) − u‖²

t = 0 is data, t = 1 is noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diff2to3.nn.items import mean_by_item

TIME_DISTRIBUTIONS = ("uniform", "logit_normal")


@dataclass(frozen=True)
class PathConfig:
    """times: "uniform" (P3.3) or "logit_normal" (TRELLIS): sigmoid(N(time_mean, time_std²))."""

    times: str = "uniform"
    time_mean: float = 1.0
    time_std: float = 1.0

    def __post_init__(self) -> None:
        if self.times not in TIME_DISTRIBUTIONS:
            raise ValueError(f"times: expected one of {', '.join(TIME_DISTRIBUTIONS)}, got {self.times!r}")
        if self.time_std <= 0:
            raise ValueError(f"time_std: expected a positive number, got {self.time_std}")


def draw_times(config: PathConfig, count: int, generator: torch.Generator) -> Tensor:
    """[count] times in [0, 1], float32 on the CPU."""
    if config.times == "uniform":
        return torch.rand(count, generator=generator)
    return torch.sigmoid(config.time_mean + config.time_std * torch.randn(count, generator=generator))


def noised(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 − t) z_0 + t ε; t broadcasts to data."""
    return (1 - t) * data + t * noise


def target_velocity(data: Tensor, noise: Tensor) -> Tensor:
    """u = ε − z_0, constant along the path."""
    return noise - data


def precondition(output: Tensor, latents: Tensor, t: Tensor) -> Tensor:
    """The velocity c_skip(t) z_t + c_out(t) F of a network's output F; t broadcasts to the latents.

    For latents of unit variance that are otherwise unknown, the best linear guess at u from z_t is c_skip z_t with
    c_skip = (2t − 1) / σ², σ² = (1 − t)² + t², and what it lacks has variance 1/σ² = c_out² (the reasoning of
    Karras et al. 2022, section 5, for this path). The network then need not learn to pass noise through itself.
    """
    t = t.to(latents.dtype)
    variance = (1 - t).square() + t.square()
    return (2 * t - 1) / variance * latents + output / variance.sqrt()


def squared_error(velocity: Tensor, target: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """‖v − u‖² averaged over the numbers of each item: [B].

    [B, …] tensors, or packed rows [N, C] with ``cu_seqlens`` [B + 1]. Half types are compared in float32.
    """
    precise = torch.promote_types(velocity.dtype, torch.float32)
    squared = (velocity.to(precise) - target.to(precise)).square()
    if cu_seqlens is None:
        return squared.flatten(1).mean(1)
    return mean_by_item(squared, cu_seqlens)
