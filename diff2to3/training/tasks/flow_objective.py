"""The loss of a flow model on stored latents (P3.3).

batch.tensors ─normalise─▶ z_0, image tokens ─▶ z_t = (1 − t) z_0 + t ε ─network─▶ v ↔ ε − z_0
    stage structure, with weights for them:  ẑ_0 = z_t − t v ─decoder─▶ logits ↔ batch.occupancy
    stage latents:                           ẑ_0 ─decoder─▶ Gaussians ─▶ renderings ↔ batch.views
                                                       centres ↔ points on the surface
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.data.encodings import MEMBER
from diff2to3.flow.matching import PathConfig, draw_times, noised, squared_error, target_velocity
from diff2to3.flow.networks import predict
from diff2to3.flow.normalization import Normalization
from diff2to3.flow.tokens import ImageTokens
from diff2to3.training.tasks.flow_augment import AugmentConfig, augmented
from diff2to3.training.tasks.vae_objective import (
    dissimilarity,
    drawn_and_true,
    of_asset,
    random_backgrounds,
)
from diff2to3.types import Gaussians, SparseVoxels
from diff2to3.vae.losses import l1, l2, surface_distances
from diff2to3.vae.structure_loss import cross_entropy, dice_loss

#: Mean squared error below which the logarithm stops counting: 40 dB.
LEAST_ERROR = 1e-4
#: Of a batch: "stage/member" → one dict of tensors an item.
Tensors = dict[str, list[dict[str, Tensor]]]


@dataclass(frozen=True)
class RenderLossConfig:
    """Stage latents: how renderings of what the predicted latents decode to are compared with ``view_set``.

    weight  of all of it; 0 for none. The velocity's error counts every latent channel of every voxel alike; this
            counts what is seen. Not for items whose image is left out
    l1, l2, ssim  weights of the terms; ssim weighs 1 - SSIM. L1 and SSIM are the autoencoder's (P3.3)
    surface  weight of the distance between Gaussians and the asset's surface (diff2to3.vae.losses.surface_distances),
             which pictures alone leave to a third of a voxel; needs data.points
    log     weight of the decimal logarithm of a view's mean squared error, which is PSNR / -10: a part less of a
            small error counts like a part less of a large one
    """

    weight: float = 0.0
    l1: float = 1.0
    l2: float = 0.0
    ssim: float = 0.2
    log: float = 0.0
    surface: float = 0.0
    view_set: str = "target"

    def __post_init__(self) -> None:
        check_weights(self, ("weight", "l1", "l2", "ssim", "log", "surface"), "render.")


@dataclass(frozen=True)
class FlowLossConfig:
    """What is minimised, and how often.

    path           the times that are learnt at
    image_dropout  how often the image is left out, for guidance
    velocity       weight of the velocity's squared error, which makes it a flow
    cross_entropy  stage structure: weight of the cross-entropy of the occupancy that the predicted latents decode to.
                   Not for items whose image is left out
    dice           stage structure: weight of the dice loss of the occupancy that the predicted latents decode to. The
                   mean of several possible latents, which is what the squared error asks for near t = 1, decodes to
                   next to nothing; this asks for the cells that are most likely occupied. Not for items whose image is
                   left out.
    render         see :class:`RenderLossConfig`
    """

    path: PathConfig = field(default_factory=PathConfig)
    image_dropout: float = 0.1
    velocity: float = 1.0
    cross_entropy: float = 0.0
    dice: float = 0.0
    render: RenderLossConfig = field(default_factory=RenderLossConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.image_dropout <= 1:
            raise ValueError(f"image_dropout: expected a probability, got {self.image_dropout}")
        check_weights(self, ("velocity", "cross_entropy", "dice"))

    @property
    def decodes(self) -> bool:
        """Whether predicted latents are decoded."""
        return self.judges_occupancy or self.render.weight > 0

    @property
    def judges_occupancy(self) -> bool:
        """Whether what structure latents decode to is compared."""
        return self.dice > 0 or self.cross_entropy > 0


@dataclass(frozen=True)
class BatchStages:
    """Stages of the data set that batches have tensors of.

    latents, tokens  the latents that are learnt, and those of the condition images
    points    points on the surface; None without that loss
    """

    latents: str
    tokens: str
    points: str | None = None


def check_weights(config: object, names: Sequence[str], prefix: str = "") -> None:
    """ValueError for a field that is no number of at least 0."""
    for name in names:
        value = getattr(config, name)
        if not value >= 0:
            raise ValueError(f"{prefix}{name}: expected a weight of at least 0, got {value}")


class FlowObjective(nn.Module):
    """A velocity network and its loss. forward(batch, randomness) → {"loss": [B]}, and the terms of a sum."""

    def __init__(
        self,
        network: nn.Module,
        loss: FlowLossConfig,
        latents: Normalization,
        image: Normalization,
        stages: BatchStages,
        resolution: int,
        image_patch_size: int,
        decoder: nn.Module | None = None,
        augment: AugmentConfig | None = None,
    ) -> None:
        """``resolution``: of the voxels that sparse latents are on. ``decoder``: of the latents, for the losses on what
        they decode to; it is neither trained nor saved.
        """
        super().__init__()
        self.name = "latent_flow" if stages.latents.startswith("latents_") else "structure_flow"
        self.add_module(self.name, network)  # the name it has in bundles, so that runs can begin with one
        self.loss = loss
        self.latents, self.image = latents, image
        self.stages, self.resolution = stages, resolution
        self.image_patch_size = image_patch_size
        self.augment = augment or AugmentConfig()
        self.decoders = (decoder,)  # in a tuple, so that its weights are not the module's

    @property
    def network(self) -> nn.Module:
        return getattr(self, self.name)

    @property
    def sparse(self) -> bool:
        return self.stages.latents.startswith("latents_")

    def image_latents(self, tensors: Tensors) -> Tensor:
        """Normalised image latents [B, C, h, w] of a batch."""
        return self.image(stored_image_latents(tensors, self.stages.tokens))

    def images(self, tensors: Tensors) -> ImageTokens:
        """Tokens of a batch's images."""
        return ImageTokens.from_latents(self.image_latents(tensors), self.image_patch_size)

    def augmented(self, image_latents: Tensor, batch: Any, randomness: Any) -> Tensor:
        """A batch's normalised image latents, changed at random."""
        generators = [randomness.generator(i, "augment") for i in batch.ids]
        return augmented(image_latents, self.augment, generators)

    def training_images(self, batch: Any, randomness: Any) -> ImageTokens:
        latents = self.augmented(self.image_latents(batch.tensors), batch, randomness)
        return ImageTokens.from_latents(latents, self.image_patch_size)

    def data(self, tensors: Tensors) -> Tensor | SparseVoxels:
        """Normalised latents of a batch."""
        stored = [item["mean"].float() for item in tensors[latent_member(self.stages.latents)]]
        if not self.sparse:
            return self.latents(torch.stack(stored))
        coords = [item["coords"] for item in tensors[voxel_member(self.resolution)]]
        return voxels_of(coords, self.latents(torch.cat(stored)), self.resolution)

    def forward(self, batch: Any, randomness: Any) -> dict[str, Tensor]:
        latents, image = self.data(batch.tensors), self.training_images(batch, randomness)
        generators = [randomness.generator(i, "flow") for i in batch.ids]
        t = torch.cat([draw_times(self.loss.path, 1, g) for g in generators])
        drop = torch.cat([torch.rand(1, generator=g) for g in generators]) < self.loss.image_dropout
        device = image.feats.device
        t, drop = t.to(device), drop.to(device)
        image = image.drop(drop)
        if isinstance(latents, SparseVoxels):
            lengths = latents.cu_seqlens.diff().tolist()
            shapes = [(n, latents.feats.shape[1]) for n in lengths]
            noise = torch.cat(draw(shapes, generators)).to(device)
            times = torch.repeat_interleave(t, latents.cu_seqlens.diff().long())[:, None]
            noisy: Tensor | SparseVoxels = latents.with_feats(noised(latents.feats, noise, times))
            target, bounds = target_velocity(latents.feats, noise), latents.cu_seqlens
        else:
            noise = torch.stack(draw([tuple(latents.shape[1:])] * len(t), generators)).to(device)
            times = t.reshape(-1, 1, 1, 1, 1)
            noisy = noised(latents, noise, times)
            target, bounds = target_velocity(latents, noise), None
        velocity = predict(self.network, noisy, t, image)
        error = squared_error(velocity, target, bounds)
        loss, terms = self.loss.velocity * error, {"velocity": error}
        if self.loss.judges_occupancy:
            assert isinstance(noisy, Tensor)
            wanted = true_grid(batch)
            logits = self.occupancy_logits(noisy - times * velocity)
            for name, function in (("dice", dice_loss), ("cross_entropy", cross_entropy)):
                if weight := getattr(self.loss, name):
                    terms[name] = torch.where(drop, 0.0, function(logits, wanted))
                    loss = loss + weight * terms[name]
        if self.loss.render.weight:
            assert isinstance(noisy, SparseVoxels)
            objects = self.decoded(noisy.with_feats(noisy.feats - times * velocity))
            terms["render"] = torch.where(drop, 0.0, self.render_loss(objects, batch, randomness))
            loss = loss + self.loss.render.weight * terms["render"]
        return {"loss": loss, **terms} if len(terms) > 1 else {"loss": loss}

    def decoder(self, device: torch.device) -> nn.Module:
        """The frozen decoder of the latents, on ``device``: it is not the module's, which so does not move it."""
        (decoder,) = self.decoders
        assert decoder is not None
        return decoder.to(device)

    def occupancy_logits(self, data: Tensor) -> Tensor:
        """What normalised latents decode to [B, R, R, R]."""
        logits: Tensor = self.decoder(data.device)(self.latents.invert(data).float())
        return logits[:, 0]

    def decoded(self, data: SparseVoxels) -> list[Gaussians]:
        """What normalised latents decode to."""
        latents = data.with_feats(self.latents.invert(data.feats).float())
        objects: list[Gaussians] = self.decoder(data.feats.device)(latents)
        return objects

    def render_loss(self, objects: Sequence[Gaussians], batch: Any, randomness: Any) -> Tensor:
        """Difference [B] between the batch's views and renderings of ``objects``, and to their surfaces."""
        c = self.loss.render
        views = batch.views[c.view_set]
        backgrounds = random_backgrounds(batch.ids, randomness).to(views.images)
        values = []
        for b, gaussians in enumerate(objects):
            own = of_asset(views, b, len(views) // len(batch.ids))
            with torch.autocast(own.images.device.type, enabled=False):
                drawn, target = drawn_and_true(gaussians.to(dtype=torch.float32), own, backgrounds[b])
                squared = l2(drawn, target)
                error = c.l1 * l1(drawn, target).mean() + c.l2 * squared.mean()
                if c.log:
                    error = error + c.log * torch.log10(squared + LEAST_ERROR).mean()
                error = error + c.ssim * dissimilarity(drawn, target, own.alphas)
                if c.surface:
                    assert self.stages.points is not None
                    points = batch.tensors[point_member(self.stages.points)][b]["points"].float()
                    generator = randomness.generator(batch.ids[b], "surface")
                    error = error + c.surface * surface_distances(
                        gaussians.to(dtype=torch.float32), points, generator
                    )
                values.append(error)
        return torch.stack(values)


def latent_member(stage: str) -> str:
    """Where a loader finds latents; the next: the voxels of sparse latents."""
    return f"{stage}/{MEMBER}"


def stored_image_latents(tensors: Tensors, stage: str) -> Tensor:
    """Of a batch, as they lie in the data set [B, C, h, w]."""
    return torch.stack([item["latents"].float() for item in tensors[view_member(stage)]])


def view_member(stage: str) -> str:
    """Of a random view. The pattern decides which, so that all stages give the same one."""
    return f"{stage}/*.safetensors"


def voxel_member(resolution: int) -> str:
    return f"voxels_{resolution}/coords.safetensors"


def point_member(stage: str) -> str:
    return f"{stage}/points.safetensors"


def true_grid(batch: Any) -> Tensor:
    """The one occupancy grid that a batch has: bool [B, R, R, R]."""
    (grid,) = batch.occupancy.values()
    return grid


def draw(shapes: Sequence[tuple[int, ...]], generators: Sequence[torch.Generator]) -> list[Tensor]:
    """Noise an item, on the CPU in float32, so that it is the same on any device and however items are dealt."""
    return [torch.randn(shape, generator=g) for shape, g in zip(shapes, generators, strict=True)]


def voxels_of(coords: Sequence[Tensor], feats: Tensor, resolution: int) -> SparseVoxels:
    """One batch from each item's cells [N, 3] and all features [ΣN, C]."""
    rows = [
        torch.cat([torch.full_like(c[:, :1], i, dtype=torch.int32), c.to(torch.int32)], 1)
        for i, c in enumerate(coords)
    ]
    packed = torch.cat(rows)
    lengths = torch.tensor([0, *(len(c) for c in coords)], device=packed.device)
    return SparseVoxels(packed, feats, resolution, lengths.cumsum(0).to(torch.int32))
