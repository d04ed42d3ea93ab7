"""Random changes of image latents while training, for models that see few images.

    latents [B, C, h, w] ─turn, zoom, shift─▶ ─tint, noise─▶ ─erase a rectangle─▶ [B, C, h, w]

On latents and not on pictures, so that nothing has to be encoded again; an autoencoder's latents are local enough for
it. Every item's changes are drawn from its own generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AugmentConfig:
    """How much at most; 0 for none.

    share   of the images that are changed
    turn    degrees, either way
    zoom    log of the factor, either way
    shift   of the side, either way and along both
    tint    standard deviation of an offset to each channel of a whole image (latents have about 1)
    noise   standard deviation of noise; an image has between none and this
    erase   of the area: a rectangle becomes 0, which is the mean of all latents
    """

    share: float = 1.0
    turn: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    tint: float = 0.0
    noise: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"augment.{name}: expected a number of at least 0, got {value}")
        if max(self.share, self.erase) > 1:
            raise ValueError(f"augment: expected share and erase up to 1, got {self.share} and {self.erase}")

    @property
    def changes(self) -> bool:
        amounts = (self.turn, self.zoom, self.shift, self.tint, self.noise, self.erase)
        return self.share > 0 and any(amounts)


def augmented(latents: Tensor, config: AugmentConfig, generators: Sequence[torch.Generator]) -> Tensor:
    """Normalised latents [B, C, h, w] and B generators (on the CPU) → the same, changed."""
    if not config.changes:
        return latents
    chosen = [k for k, g in enumerate(generators) if float(torch.rand(1, generator=g)) < config.share]
    if not chosen:
        return latents
    own = [generators[k] for k in chosen]
    rows = torch.tensor(chosen, device=latents.device)
    changed = latents[rows]
    if config.turn or config.zoom or config.shift:
        changed = moved(changed, torch.stack([draw_matrix(config, g) for g in own]))
    offsets = torch.stack([draw_offsets(config, latents[0].shape, g) for g in own])
    kept = torch.stack([draw_kept(config, latents.shape[2:], g) for g in own])[:, None]
    changed = (changed + offsets.to(changed)) * kept.to(changed)
    return latents.index_copy(0, rows, changed)


def moved(latents: Tensor, matrices: Tensor) -> Tensor:
    """Resampled at what ``matrices`` [B, 2, 3] make of the target's places in [-1, 1]²; edges go on outside."""
    grid = torch.nn.functional.affine_grid(matrices.to(latents), list(latents.shape), align_corners=False)
    return torch.nn.functional.grid_sample(latents, grid, padding_mode="border", align_corners=False)


def draw_matrix(config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """[2, 3]: turn, zoom and shift."""
    turn, zoom, x, y = (2 * torch.rand(4, generator=generator) - 1).tolist()
    angle, scale = math.radians(config.turn * turn), math.exp(config.zoom * zoom)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor([[cos, -sin, 2 * config.shift * x], [sin, cos, 2 * config.shift * y]])


def draw_offsets(config: AugmentConfig, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """[C, h, w]: tint and noise."""
    tint = config.tint * torch.randn(shape[0], 1, 1, generator=generator)
    strength = config.noise * float(torch.rand(1, generator=generator))
    return tint + strength * torch.randn(shape, generator=generator) if strength else tint.expand(shape)


def draw_kept(config: AugmentConfig, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """float32 [h, w]: 0 in the rectangle that is erased, 1 elsewhere."""
    area, aspect, x, y = torch.rand(4, generator=generator).tolist()
    height, width = shape
    share, ratio = config.erase * area, 2 ** (2 * aspect - 1)
    rows = min(height, round(height * math.sqrt(share * ratio)))
    columns = min(width, round(width * math.sqrt(share / ratio)))
    top, left = round(y * (height - rows)), round(x * (width - columns))
    kept = torch.ones(height, width)
    kept[top : top + rows, left : left + columns] = 0
    return kept
