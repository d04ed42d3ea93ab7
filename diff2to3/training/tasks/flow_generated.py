"""Stage 2 taught on the voxels that stage 1 generates, as it meets them when it is used. Not in the paper.

image ─augment─▶ stage 1 of a bundle, which stays as it is ─▶ voxels ┐
image ──────────────────────────────────────────── noise on these ─network─▶ ẑ_0 ─decoder─▶ Gaussians
    Gaussians ─▶ renderings ↔ batch.views
    Gaussians ↔ points on the asset's surface

Generated voxels have no true latents, so there is no velocity to learn, and no path from data to noise: what is judged
is one step from noise to Gaussians.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from diff2to3.flow.networks import predict
from diff2to3.flow.tokens import ImageTokens
from diff2to3.pipeline import ImageTo3D
from diff2to3.pipeline.denoise import Conditions
from diff2to3.training.tasks.flow_objective import FlowObjective, draw, point_member
from diff2to3.types import Gaussians, SparseVoxels

#: How many points of a surface are compared with twice as many Gaussians: of either a random choice.
NUM_COMPARED = 1024


class StructureStage:
    """Stage 1 of a whole model, by name or folder. No module, so that it is neither trained nor saved."""

    def __init__(self, source: str, threshold: float) -> None:
        self.source, self.threshold = source, threshold

    @torch.no_grad()
    def __call__(self, image_latents: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Normalised image latents [B, C, h, w] → active voxels int32 [N, 4], at least one an item.

        Without guidance, which would take twice the time.
        """
        model = load_model(self.source, image_latents.device)
        settings = replace(model.structure_settings, guidance_scale=1.0)
        logits = model.structure_logits(Conditions((image_latents,)), settings, generators)[:, 0]
        highest = logits.amax((1, 2, 3), keepdim=True)
        return torch.nonzero((logits > self.threshold) | (logits == highest)).to(torch.int32)


@lru_cache(maxsize=1)
def load_model(source: str, device: torch.device) -> ImageTo3D:
    """A whole model, once a process."""
    return ImageTo3D.from_pretrained(source, device=device)


class GeneratedObjective(FlowObjective):
    """A network for stage 2, judged by what is generated with it. ``structure`` is set by the task."""

    structure: StructureStage

    def forward(self, batch: Any, randomness: Any) -> dict[str, Tensor]:
        generators = [randomness.generator(i, "flow") for i in batch.ids]
        made = self.generated(
            self.image_latents(batch.tensors), self.training_latents(batch, randomness), generators
        )
        objects, weights = self.decoded(made), self.loss
        terms = {"render": self.render_loss(objects, batch, randomness)}
        loss = weights.render.weight * terms["render"]
        if weights.surface.weight:
            points = [item["points"].float() for item in batch.tensors[point_member(weights.surface.points)]]
            pairs = zip(objects, points, generators, strict=True)
            terms["surface"] = torch.stack([surface_loss(*pair, weights.surface.reach) for pair in pairs])
            loss = loss + weights.surface.weight * terms["surface"]
        return {"loss": loss, **terms}

    def generated(
        self, image_latents: Tensor, seen_first: Tensor, generators: Sequence[torch.Generator]
    ) -> SparseVoxels:
        """Normalised latents, in one step from noise, on the voxels that stage 1 makes of ``seen_first``."""
        coords = self.structure(seen_first, generators)
        counts = torch.bincount(coords[:, 0], minlength=len(generators)).tolist()
        shapes = [(count, len(self.latents.mean)) for count in counts]
        noise = torch.cat(draw(shapes, generators)).to(image_latents.device)
        voxels = SparseVoxels.from_coords(coords, noise, self.resolution, len(generators))
        image = ImageTokens.from_latents(image_latents, self.image_patch_size)
        velocity = predict(self.network, voxels, image_latents.new_ones(len(generators)), image)
        return voxels.with_feats(noise - velocity)


def surface_loss(gaussians: Gaussians, points: Tensor, generator: torch.Generator, reach: float) -> Tensor:
    """Between Gaussians and ``points`` [N, 3] of a surface: the mean of f over the Gaussians, by opacity, and of f over
    the points, and of these two the mean. f(d) = 1 - exp(-d² / reach²), for the distance d to the nearest of the
    others: the complement of an F-score without its steps.
    """
    rows = choose(len(gaussians), 2 * NUM_COMPARED, generator).to(points.device)
    means, weights = gaussians.means[rows].float(), gaussians.opacities[rows].float()
    points = points[choose(len(points), NUM_COMPARED, generator).to(points.device)]
    with torch.no_grad():
        distances = torch.cdist(means, points)
        nearest_points, nearest_means = distances.argmin(1), distances.argmin(0)
    off = 1 - torch.exp(-(means - points[nearest_points]).square().sum(1) / reach**2)
    missed = 1 - torch.exp(-(points - means[nearest_means]).square().sum(1) / reach**2)
    return ((off * weights).sum() / weights.sum().clamp(min=1e-6) + missed.mean()) / 2


def choose(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Indices of a random choice of ``count`` out of ``total``; of all, where there are no more."""
    return torch.randperm(total, generator=generator)[:count]
