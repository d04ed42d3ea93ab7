"""One stage of generation for any velocity network: conditions, guidance and sampler put together.

network                        condition of B items                  without condition
StructureDiT, LatentDiT        tokens [B, L, C]                      one zero token (or the empty text)
StructureSMDiT, LatentSMDiT    image latents [B, C, h, w] → patches  no token at all
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.errors import InputError
from diff2to3.flow.samplers import (
    SAMPLERS,
    Step,
    Velocity,
    alternating,
    averaged,
    guided,
    timesteps,
)
from diff2to3.flow.smdit import SMDiT
from diff2to3.flow.tokens import ImageTokens
from diff2to3.types import SparseVoxels

#: How several images of one object are combined: a condition a step in turn, or the mean of all velocities.
MULTI_IMAGE_MODES = ("stochastic", "multidiffusion")

#: progress(stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]
#: A condition, or None for its absence → velocity
VelocityOf = Callable[[Tensor | None], Velocity]


@dataclass(frozen=True)
class StageSettings:
    """How a stage is sampled.

    guidance_interval  in t: 1 is noise, 0 is data
    shift              above 1: more of the steps near the noise
    sampler            one of diff2to3.flow.samplers.SAMPLERS
    """

    num_steps: int = 25
    guidance_scale: float = 6.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 3.0
    sampler: str = "euler"

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise InputError(f"steps: expected at least 1, got {self.num_steps}")
        low, high = self.guidance_interval
        if not (self.shift > 0 and low <= high):
            raise InputError(f"shift must be positive and the guidance interval (low, high), got {self}")
        if not abs(self.guidance_scale) < 1e3:  # also false for NaN
            raise InputError(f"guidance scale: expected a number below 1000, got {self.guidance_scale}")
        if self.sampler not in SAMPLERS:
            raise InputError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {self.sampler!r}")


@dataclass(frozen=True)
class Conditions:
    """What a batch of B objects is generated from.

    present  one entry an image of each object (or its text): tokens [B, L, C] or image latents [B, C, h, w]
    absent   tokens [B, L', C] that stand for no condition; None where the network takes no tokens at all for that
    """

    present: tuple[Tensor, ...]
    absent: Tensor | None = None


def structure_velocity(flow: Any, batch_size: int, device: torch.device) -> VelocityOf:
    """Of dense latents [B, C, r, r, r]."""

    def velocity_of(cond: Tensor | None) -> Velocity:
        if isinstance(flow, SMDiT):
            cond = image_tokens(flow, cond, batch_size, device)
            plan = flow.plan(cond)  # type: ignore[operator]
        else:
            plan = flow.plan(batch_size, cond.shape[1], device)  # type: ignore[union-attr]
        return lambda z, t: flow(z, time_tensor(t, batch_size), cond, plan)

    return velocity_of


def latent_velocity(flow: Any, voxels: SparseVoxels) -> VelocityOf:
    """Of latents [N, C] on these voxels."""
    batch_size = voxels.batch_size
    shared = None if isinstance(flow, SMDiT) else flow.plan(voxels, 1)

    def velocity_of(cond: Tensor | None) -> Velocity:
        if shared is None:
            cond = image_tokens(flow, cond, batch_size, voxels.coords.device)
            plan = flow.plan(voxels, cond)
        else:
            plan = shared.with_context(cond.shape[1])  # type: ignore[union-attr]
        return lambda z, t: flow(voxels.with_feats(z), time_tensor(t, batch_size), cond, plan)

    return velocity_of


def image_tokens(flow: SMDiT, latents: Tensor | None, batch_size: int, device: torch.device) -> Any:
    if latents is None:
        return ImageTokens.none(batch_size, flow.config.image_width, device)
    return ImageTokens.from_latents(latents, flow.config.image_patch_size)


def time_tensor(t: float, batch_size: int) -> Tensor:
    """[B], in float64 on the CPU: networks round it once, after scaling."""
    return torch.full((batch_size,), t, dtype=torch.float64)


def condition_channels(flow: nn.Module) -> int:
    """Channels of the conditions that a network was made for."""
    config: Any = flow.config
    return int(config.image_channels if isinstance(flow, SMDiT) else config.cond_channels)


def sample(
    velocity_of: VelocityOf,
    noise: Tensor,
    conditions: Conditions,
    settings: StageSettings,
    multi_image: str,
    stage: str,
    progress: Progress | None,
) -> Tensor:
    """From noise to data, with guidance over one or several conditions."""
    present = [velocity_of(cond) for cond in conditions.present]
    combine = averaged if multi_image == "multidiffusion" else alternating
    conditional = present[0] if len(present) == 1 else combine(present)
    velocity = conditional
    if settings.guidance_scale != 1:
        unconditional = velocity_of(conditions.absent)
        velocity = guided(conditional, unconditional, settings.guidance_scale, settings.guidance_interval)

    def on_step(step: Step) -> None:
        if progress is not None:
            progress(stage, step.index + 1, step.num_steps)

    times = timesteps(settings.num_steps, settings.shift)
    return SAMPLERS[settings.sampler](velocity, noise, times, on_step)
