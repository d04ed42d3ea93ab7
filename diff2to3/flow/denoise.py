"""One stage of generation for any velocity network: conditions, guidance and sampler put together.

network                        condition of B items                  without condition
StructureDiT, LatentDiT        tokens [B, L, C]                      one zero token (or the empty text)
StructureSMDiT, LatentSMDiT    image latents [B, C, h, w] → patches  no token at all
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.errors import InputError
from diff2to3.flow import networks
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
    threshold          structure only: the decoder's logit above which a voxel is active. Below 0, a model that is
                       not sure of a surface leaves fewer holes in it
    prune      latents only: leave out Gaussians of which pictures of 128² from 16 sides show less than so many pixels
               in all: what is inside, or next to transparent. 0 keeps all
    """

    num_steps: int = 25
    guidance_scale: float = 6.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 3.0
    sampler: str = "euler"
    threshold: float = 0.0
    prune: float = 0.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise InputError(f"steps: expected at least 1, got {self.num_steps}")
        interval = tuple(self.guidance_interval)  # read from a file it is a list
        if not (self.shift > 0 and len(interval) == 2 and interval[0] <= interval[1]):
            raise InputError(f"shift must be positive and guidance_interval [low, high], got {self}")
        object.__setattr__(self, "guidance_interval", interval)
        if not abs(self.guidance_scale) < 1e3:  # also false for NaN
            raise InputError(f"guidance scale: expected a number below 1000, got {self.guidance_scale}")
        if not math.isfinite(self.threshold):
            raise InputError(f"threshold: expected a number, got {self.threshold}")
        if not (self.prune >= 0 and math.isfinite(self.prune)):
            raise InputError(f"prune: expected a number of pixels of at least 0, got {self.prune}")
        if self.sampler not in SAMPLERS:
            raise InputError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {self.sampler!r}")

    @property
    def one_step(self) -> bool:
        """Whether a model of these settings is no flow: it predicts its result from noise at once, and was not trained
        for the times in between.
        """
        return self.num_steps == 1


#: The settings that only a flow has.
OF_FLOWS = ("num_steps", "guidance_scale", "sampler")


def resampled(stages: Sequence[StageSettings], changes: Mapping[str, Any]) -> list[StageSettings]:
    """A model's settings with ``changes`` (of :data:`OF_FLOWS`, where not None) to the stages that are flows.

    Raises:
        InputError: no stage is one, so that the changes have no meaning.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if given and all(stage.one_step for stage in stages):
        raise InputError(
            f"{', '.join(given)}: this model makes its result in one step, so there is nothing to set; leave it "
            "out, or take a model that is a flow"
        )
    return [stage if stage.one_step else replace(stage, **given) for stage in stages]


def check_one_step(own: StageSettings, given: StageSettings, stage: str) -> None:
    """InputError where a model's one-step stage is asked to be sampled in another way."""
    changed = [name for name in OF_FLOWS if getattr(own, name) != getattr(given, name)]
    if own.one_step and changed:
        raise InputError(
            f"{stage}: {', '.join(changed)}: this model makes its result in one step; it cannot be sampled otherwise"
        )


@dataclass(frozen=True)
class Conditions:
    """What a batch of B objects is generated from.

    present  one entry an image of each object (or its text): tokens [B, L, C] or image latents [B, C, h, w]
    absent   tokens [B, L', C] that stand for no condition; None with image latents
    """

    present: tuple[Tensor, ...]
    absent: Tensor | None = None

    def rows(self, items: slice) -> Conditions:
        """Some of the items, as a batch of their own."""
        absent = None if self.absent is None else self.absent[items]
        return Conditions(tuple(image[items] for image in self.present), absent)


def velocities(flow: nn.Module, noise: Tensor | SparseVoxels) -> VelocityOf:
    """How a network moves ``noise``: dense latents [B, C, r, r, r], or latents on voxels."""
    batch_size = noise.batch_size if isinstance(noise, SparseVoxels) else len(noise)
    device = noise.coords.device if isinstance(noise, SparseVoxels) else noise.device

    def velocity_of(cond: Tensor | None) -> Velocity:
        if cond is not None and cond.ndim == 3:
            return token_velocity(flow, noise, cond)
        if cond is None:
            image = ImageTokens.none(batch_size, image_width(flow), device)
        else:
            image = ImageTokens.from_latents(cond, image_patch_size(flow, cond.shape[1]))
        return networks.velocity_of(flow, noise, image)

    return velocity_of


def token_velocity(flow: Any, noise: Tensor | SparseVoxels, cond: Tensor) -> Velocity:
    """Of the cross-attending networks, with tokens [B, L, C] as TRELLIS's encoders give them."""
    batch_size, length, _ = cond.shape
    if isinstance(noise, SparseVoxels):
        plan = flow.plan(noise, length)
        return lambda z, t: flow(noise.with_feats(z), time_tensor(t, batch_size), cond, plan)
    plan = flow.plan(batch_size, length, noise.device)
    return lambda z, t: flow(z, time_tensor(t, batch_size), cond, plan)


def time_tensor(t: float, batch_size: int) -> Tensor:
    """[B], in float64 on the CPU: networks round it once, after scaling."""
    return torch.full((batch_size,), t, dtype=torch.float64)


def image_width(flow: nn.Module) -> int:
    """Channels of an image token."""
    config: Any = flow.config
    return int(config.image_width if isinstance(flow, SMDiT) else config.cond_channels)


def image_patch_size(flow: nn.Module, channels: int) -> int:
    """Latent pixels that an image token spans on each axis, of latents with ``channels``. InputError if none fits."""
    patch_size = math.isqrt(image_width(flow) // channels)
    if channels * patch_size**2 != image_width(flow):
        raise InputError(
            f"the condition encoder has {channels} channels; the flow models were trained for image tokens of "
            f"{image_width(flow)} channels, which is not that number times a square"
        )
    return patch_size


def sample(
    velocity_of: VelocityOf,
    noise: Tensor,
    conditions: Conditions,
    settings: StageSettings,
    multi_image: str,
    stage: str,
    progress: Progress | None,
) -> Tensor:
    """From noise to data, with guidance over one or several conditions. Where there are fewer steps than conditions,
    taking turns would leave some out: their velocities are averaged then.
    """
    present = [velocity_of(cond) for cond in conditions.present]
    take_turns = multi_image == "stochastic" and len(present) <= settings.num_steps
    combine = alternating if take_turns else averaged
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


def sample_structure(
    flow: Any,
    conditions: Conditions,
    settings: StageSettings,
    generators: Sequence[torch.Generator],
    device: torch.device,
    multi_image: str = MULTI_IMAGE_MODES[0],
    progress: Progress | None = None,
    one_by_one: bool = False,
) -> list[Tensor]:
    """Stage 1's latents [B, C, r, r, r] as the flow makes them, from noise that each item's generator gives.

    One tensor; with ``one_by_one`` a tensor of a single item for each item.

    ``one_by_one``: in a batch sums are rounded otherwise, a logit beside the threshold changes sides, and the object is
    not the one it is alone.
    """
    count, c = len(generators), flow.config
    parts = [slice(k, k + 1) for k in range(count)] if one_by_one else [slice(count)]
    made = []
    for number, rows in enumerate(parts):
        shape = (1, c.in_channels, *(c.resolution,) * 3)
        noise = torch.cat([torch.randn(shape, generator=g) for g in generators[rows]]).to(device)
        report = share_of(progress, number, len(parts))
        seen = conditions.rows(rows)
        made.append(sample(velocities(flow, noise), noise, seen, settings, multi_image, "structure", report))
    return made


def share_of(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Where ``count`` passes of equal length make up a stage: what pass ``number`` reports to."""
    if progress is None or count == 1:
        return progress
    return lambda stage, step, steps: progress(stage, number * steps + step, count * steps)
