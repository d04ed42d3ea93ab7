"""Generation in the object's own frame: TRELLIS's weights, and flows that train/flow.py trains.

pictures or texts ─conditioner─▶ conditions ─structure flow─▶ latents ─decoder─▶ voxels
                                     └──────────────────────── latent flow ─▶ latents ─decoder─▶ Gaussians
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.errors import InputError
from diff2to3.flow.denoise import (
    MULTI_IMAGE_MODES,
    Conditions,
    Progress,
    StageSettings,
    sample,
    sample_structure,
    velocities,
)
from diff2to3.pipeline.parts import Parts, some_voxels, visiting
from diff2to3.pipeline.photos import Photo
from diff2to3.types import Gaussians, SparseVoxels
from diff2to3.views.photo_frame import PhotoCamera


@dataclass(frozen=True)
class SeenPrompts:
    """Encoded prompts of a batch, and how several photos of one object are combined."""

    conditions: Conditions
    count: int
    multi_image: str = MULTI_IMAGE_MODES[0]


class ObjectStages:
    """See :class:`diff2to3.pipeline.stages.Stages`."""

    frame = "object"

    def __init__(self, parts: Parts) -> None:
        self.networks, self.conditioner, self.kind = parts.networks, parts.conditioner, parts.kind
        self.structure_normalization = parts.structure_normalization
        self.latent_normalization = parts.latent_normalization
        self.image_normalization = parts.image_normalization
        self.device, self.low_memory = parts.device, parts.low_memory

    def all_networks(self) -> list[nn.Module]:
        return [*vars(self.networks).values(), self.conditioner]

    def on_device(self, network: nn.Module) -> AbstractContextManager[Any]:
        """The network, on the device; with ``low_memory`` it goes back to the CPU afterwards."""
        return visiting(network, self.device, self.low_memory)

    def see(
        self,
        prompts: Sequence[Any],
        photos: Sequence[tuple[Photo, ...]],
        multi_image: str = MULTI_IMAGE_MODES[0],
    ) -> SeenPrompts:
        """Each object with the same number of photos. One after another: in a batch sums are rounded otherwise. The
        absence of a text is the empty text; of an image, zeros or nothing.
        """
        counts = {len(own) for own in photos}
        if len(counts) != 1:
            raise InputError(f"prompts: expected the same number of photos for each, got {sorted(counts)}")
        with self.on_device(self.conditioner) as conditioner:
            if self.kind == "text":
                tokens = torch.cat([conditioner([text]) for text in (*prompts, "")]).to(self.device)
                absent = tokens[-1:].expand(len(prompts), -1, -1)
                return SeenPrompts(Conditions((tokens[:-1],), absent), len(prompts), multi_image)
            present = [
                torch.cat([conditioner(photo.picture[None].to(self.device)) for photo in same_place])
                for same_place in zip(*photos, strict=True)
            ]
        present = [latents.to(self.device) for latents in present]
        if self.image_normalization is not None:
            present = [self.image_normalization(latents) for latents in present]
        # Attention to equal tokens returns their value whatever their number, so one zero token stands for all.
        nothing = None if present[0].ndim == 4 else torch.zeros_like(present[0][:, :1])
        return SeenPrompts(Conditions(tuple(present), nothing), len(photos), multi_image)

    def occupancy(
        self,
        seen: SeenPrompts,
        settings: StageSettings,
        generators: Sequence[torch.Generator],
        progress: Progress | None = None,
    ) -> Tensor:
        """An item at a time: in a batch sums are rounded otherwise, a logit beside the threshold changes sides, and the
        object is not the one it is alone.
        """
        with self.on_device(self.networks.structure_flow) as flow:
            made = sample_structure(
                flow,
                seen.conditions,
                settings,
                generators,
                self.device,
                seen.multi_image,
                progress,
                one_by_one=True,
            )
        if self.structure_normalization is not None:
            made = [self.structure_normalization.invert(z) for z in made]
        with self.on_device(self.networks.structure_decoder) as decoder:
            return some_voxels(torch.cat([decoder(z) for z in made]), settings.threshold)

    def latents(
        self,
        coords: Tensor,
        seen: SeenPrompts,
        settings: StageSettings,
        generators: Sequence[torch.Generator],
        progress: Progress | None = None,
    ) -> SparseVoxels:
        with self.on_device(self.networks.latent_flow) as flow:
            c = flow.config
            counts = torch.bincount(coords[:, 0], minlength=len(generators)).tolist()
            parts = [
                torch.randn(n, c.in_channels, generator=g) for n, g in zip(counts, generators, strict=True)
            ]
            noise = torch.cat(parts).to(self.device)
            voxels = SparseVoxels.from_coords(coords, noise, c.resolution, len(generators))
            moved = velocities(flow, voxels)
            z = sample(moved, noise, seen.conditions, settings, seen.multi_image, "latents", progress)
        if self.latent_normalization is not None:
            z = self.latent_normalization.invert(z)
        return voxels.with_feats(z)

    def decode(self, latents: SparseVoxels) -> list[Gaussians]:
        with self.on_device(self.networks.decoder) as decoder:
            made: list[Gaussians] = decoder(latents)
        return made

    def cameras(self, seen: SeenPrompts) -> list[PhotoCamera | None]:
        return [None] * seen.count

    def refined(
        self, gaussians: Sequence[Gaussians], seen: SeenPrompts, steps: int
    ) -> tuple[list[Gaussians], list[PhotoCamera | None]]:
        raise InputError("refine: this model does not say where the photo was taken from; give 0")
