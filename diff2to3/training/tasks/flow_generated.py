"""Stage 2 taught on the voxels that stage 1 generates, as it meets them when it is used. Not in the paper.

image ─augment─▶ stage 1 of a bundle, which stays as it is ─▶ voxels ┐
    or, of assets that it knows too well: what is expected of them   │
image ──────────────────────────────────────────── noise on these ─network─▶ ẑ_0 ─decoder─▶ Gaussians
    Gaussians ─▶ renderings ↔ batch.views

Generated voxels have no true latents, so there is no velocity to learn, and no path from data to noise: what is judged
is one step from noise to Gaussians.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.checkpoint import MODEL_FILE, read_bundle
from diff2to3.config import config_from_dict
from diff2to3.errors import InputError
from diff2to3.flow.denoise import Conditions, StageSettings, sample_structure
from diff2to3.flow.networks import predict
from diff2to3.flow.normalization import Normalization
from diff2to3.hub import Source
from diff2to3.networks import filled, network_builder
from diff2to3.training.tasks.flow_objective import FlowObjective, Tensors, draw, stored_image_latents
from diff2to3.types import SparseVoxels
from diff2to3.vae.sparse_structure import active_voxels, with_one_active


class StructureStage:
    """Stage 1 of a whole model, by name or folder. No module, so that it is neither trained nor saved."""

    def __init__(self, source: str, threshold: float) -> None:
        self.source, self.threshold = source, threshold

    @torch.no_grad()
    def __call__(self, image_latents: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Normalised image latents [B, C, h, w] → active voxels int32 [N, 4], at least one an item.

        Without guidance, which would take twice the time.
        """
        stage, device = load_stage(self.source, image_latents.device), image_latents.device
        (z,) = sample_structure(stage.flow, Conditions((image_latents,)), stage.settings, generators, device)
        if stage.normalization is not None:
            z = stage.normalization.invert(z)
        return active_voxels(with_one_active(stage.decoder(z)), self.threshold)


@dataclass(frozen=True)
class LoadedStage:
    """The networks of stage 1, and how it is sampled here."""

    flow: nn.Module
    decoder: nn.Module
    settings: StageSettings
    normalization: Normalization | None


@lru_cache(maxsize=1)
def load_stage(source: str, device: torch.device) -> LoadedStage:
    """Stage 1 of a bundle, once a process."""
    place = Source(source)
    path = place.file(MODEL_FILE)
    info = read_bundle(path.parent)
    networks = []
    for name in ("structure_flow", "structure_decoder"):
        if name not in info.networks:
            raise InputError(f"{path}: no network {name!r}; data.generated.bundle needs a whole model")
        entry = info.networks[name]
        build = network_builder(entry, f"{path}: {name}")
        network = filled(build, place.file(entry.file), entry.half, device)
        networks.append(network.to(device).eval().requires_grad_(False))
    samplers = info.settings.get("samplers", {}).get("structure", {})
    settings = config_from_dict(StageSettings, samplers, f"{path}: samplers: structure")
    values = info.settings.get("structure_latents")
    flow: Any = networks[0]
    normalization = None
    if values is not None:
        normalization = Normalization.of(values, flow.config.in_channels, f"{path}: structure_latents")
    return LoadedStage(flow, networks[1], replace(settings, guidance_scale=1.0), normalization)


class GeneratedObjective(FlowObjective):
    """A network for stage 2, judged by what is generated with it.

    structure  image latents and a generator an item → active voxels, as :class:`StructureStage` does
    sees       where stage 1 has an image encoder of its own: the stage of its latents, and what normalises them
    share      with a stage of expected occupancy: training takes the cells above it in place of stage 1's voxels
    parts      as of :class:`FlowObjective`
    """

    def __init__(
        self,
        structure: Callable[[Tensor, Sequence[torch.Generator]], Tensor],
        sees: tuple[str, Normalization] | None = None,
        share: float = 0.3,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.structure, self.share = structure, share
        self.structure_sees = sees  # in a tuple, so that it is not the module's

    def forward(self, batch: Any, randomness: Any) -> dict[str, Tensor]:
        generators = [randomness.generator(i, "flow") for i in batch.ids]
        made = self.one_step(self.training_voxels(batch, randomness, generators), batch.tensors, generators)
        loss = self.render_loss(self.decoded(made), batch, randomness)
        return {"loss": self.loss.render.weight * loss}

    def training_voxels(self, batch: Any, randomness: Any, generators: Sequence[torch.Generator]) -> Tensor:
        """Active voxels int32 [N, 4]: stage 1's, of augmented images; or the cells expected to be occupied."""
        if self.stages.expected is not None:
            wanted = self.occupancy(batch) - self.share
            return active_voxels(with_one_active(wanted[:, None]))
        seen = self.augmented(self.structure_image_latents(batch.tensors), batch, randomness)
        return self.structure(seen, generators)

    def structure_image_latents(self, tensors: Tensors) -> Tensor:
        """Normalised image latents of a batch, as stage 1 sees them."""
        if self.structure_sees is None:
            return self.image_latents(tensors)
        stage, normalization = self.structure_sees
        latents = stored_image_latents(tensors, stage)
        return normalization.to(latents.device)(latents)

    def generated(self, tensors: Tensors, generators: Sequence[torch.Generator]) -> SparseVoxels:
        """Normalised latents of a batch's images, as generation makes them."""
        coords = self.structure(self.structure_image_latents(tensors), generators)
        return self.one_step(coords, tensors, generators)

    def one_step(
        self, coords: Tensor, tensors: Tensors, generators: Sequence[torch.Generator]
    ) -> SparseVoxels:
        """Normalised latents, in one step from noise, on active voxels [N, 4]."""
        image = self.images(tensors)
        counts = torch.bincount(coords[:, 0], minlength=len(generators)).tolist()
        shapes = [(count, len(self.latents.mean)) for count in counts]
        noise = torch.cat(draw(shapes, generators)).to(coords.device)
        voxels = SparseVoxels.from_coords(coords, noise, self.resolution, len(generators))
        times = torch.ones(len(generators), device=coords.device)
        return voxels.with_feats(noise - predict(self.network, voxels, times, image))
