"""What both stages of the photo frame share in training: the times, cameras and photographs that a batch is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diff2to3.training.task import Randomness

#: What a camera that is a little wrong is kept within: degrees of elevation, and the least focal length in crop sides.
STEEPEST, LEAST_FOCAL = 80.0, 0.6


@dataclass(frozen=True)
class ShownConfig:
    """What a flow of the photo frame is shown.

    time_mean, time_std  logit-normal times (P3.3)
    pure_noise           share of the items at times from ``pure_from`` to 1, where a sampler starts
    dropout              share of the items without their photo, for guidance
    elevation_noise, focal_noise  deviations of the camera that features are lifted at: degrees, log
    exact_camera         share of the items without that noise
    """

    time_mean: float = 1.0
    time_std: float = 1.2
    pure_noise: float = 0.3
    pure_from: float = 1.0
    dropout: float = 0.1
    elevation_noise: float = 4.0
    focal_noise: float = 0.15
    exact_camera: float = 0.3

    def __post_init__(self) -> None:
        for name in ("pure_noise", "pure_from", "dropout", "exact_camera"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        for name in ("time_std", "elevation_noise", "focal_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Draws:
    """Random numbers of a batch on ``device``, each from its asset, the step and a name."""

    randomness: Randomness
    ids: Sequence[str]
    device: torch.device

    def uniform(self, name: str, *shape: int) -> Tensor:
        """[B, *shape] in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=self.generator(i, name)) for i in self.ids]).to(
            self.device
        )

    def normal(self, name: str, *shape: int) -> Tensor:
        """[B, *shape] of unit variance."""
        return torch.stack([torch.randn(shape, generator=self.generator(i, name)) for i in self.ids]).to(
            self.device
        )

    def rows(self, name: str, counts: Sequence[int], channels: int) -> Tensor:
        """Noise for ``counts`` rows of each item: [sum of counts, channels]."""
        parts = [
            torch.randn(count, channels, generator=self.generator(i, name))
            for i, count in zip(self.ids, counts, strict=True)
        ]
        return torch.cat(parts).to(self.device)

    def generator(self, asset_id: str, name: str) -> torch.Generator:
        return self.randomness.generator(asset_id, name)


def shown_times(config: ShownConfig, draw: Draws) -> Tensor:
    """The time of every item [B]."""
    time = torch.sigmoid(config.time_mean + config.time_std * draw.normal("time"))
    pure = 1 - (1 - config.pure_from) * draw.uniform("pure_time")
    return torch.where(draw.uniform("pure") < config.pure_noise, pure, time)


def shown_photos(config: ShownConfig, draw: Draws) -> Tensor:
    """Whether an item comes with its photo: bool [B]."""
    return draw.uniform("dropout") >= config.dropout


def shown_cameras(
    config: ShownConfig, draw: Draws, elevations: Tensor, focals: Tensor
) -> tuple[Tensor, Tensor]:
    """True cameras, radians and crop sides [B] → the same, or as wrong as predicted ones."""
    noisy = (draw.uniform("exact") >= config.exact_camera).float()
    spread = math.radians(config.elevation_noise)
    elevations = elevations + noisy * spread * draw.normal("elevation")
    focals = focals * torch.exp(noisy * config.focal_noise * draw.normal("focal"))
    steepest = math.radians(STEEPEST)
    return elevations.clamp(-steepest, steepest), focals.clamp(min=LEAST_FOCAL)
