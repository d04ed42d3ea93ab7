"""The loss of the 2to3-VAE: features on voxels in, Gaussians out, judged by their renderings (P3.1, P3.3).

batch.voxels ─▶ encoder ─▶ posterior ─▶ latents ─▶ decoder ─▶ Gaussians ─▶ renderings ↔ batch.views
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diff2to3.data.pictures import shrink
from diff2to3.gaussians.render import render
from diff2to3.types import Gaussians, SparseVoxels, Views
from diff2to3.vae import losses
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder


@dataclass(frozen=True)
class VaeLossConfig:
    """Weights of the losses. The defaults are the paper's and TRELLIS's.

    l1, ssim, lpips  of renderings; ssim weighs 1 - SSIM; lpips is from ``lpips_weights``
                     (eval/convert_weights.py makes the file); without them ``edges`` takes its place
    l2, edges        further ones: the squared difference, and the L1 of neighbouring pixels' differences over
                     three sizes; edges weighs as much as lpips where it stands in for it
    kl, volume, opacity  regularisers: KL to N(0, 1), mean Π scales, mean (opacity - 1)²
    """

    l1: float = 1.0
    l2: float = 0.0
    ssim: float = 0.2
    lpips: float = 0.2
    lpips_weights: str | None = None
    edges: float = 0.0
    kl: float = 1e-6
    volume: float = 1e4
    opacity: float = 1e-3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and value < 0:
                raise ValueError(f"{name}: expected a weight of at least 0, got {value}")

    def with_what_is_there(self) -> VaeLossConfig:
        """LPIPS replaced by edges where there are no weights for it."""
        if not self.lpips or self.lpips_weights:
            return self
        return replace(self, lpips=0.0, edges=self.edges or self.lpips)


class VaeObjective(nn.Module):
    """Encoder, decoder and loss. forward(batch, randomness) → losses by name, each [B], one number an asset."""

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        loss: VaeLossConfig,
        view_set: str = "target",
        sizes: tuple[tuple[int, int], ...] = (),
        perceptual: nn.Module | None = None,
    ) -> None:
        """``sizes``: (step, pixels): from that step on, views are shrunk to so many pixels a side."""
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.loss, self.view_set, self.sizes = loss, view_set, sizes
        self.perceptual = [perceptual]  # in a list: its weights are not this module's to train or save
        self.shared_plan = encoder.plan_key == decoder.plan_key

    def forward(self, batch: Any, randomness: Any) -> dict[str, Tensor]:
        voxels: SparseVoxels = batch.voxels
        plan = self.encoder.plan(voxels)
        posterior = self.encoder(voxels, plan)
        latents = posterior.mean + (0.5 * posterior.logvar).exp() * self.noise(voxels, batch.ids, randomness)
        objects = self.decoder(voxels.with_feats(latents), plan if self.shared_plan else None)
        views = batch.views[self.view_set]
        views = shrink(views, self.size_at(batch.step) or views.width)
        per_asset = len(views) // len(batch.ids)
        backgrounds = random_backgrounds(batch.ids, randomness).to(views.images)
        terms = [
            self.object_losses(g, of_asset(views, b, per_asset), backgrounds[b])
            for b, g in enumerate(objects)
        ]
        out = {name: torch.stack([t[name] for t in terms]) for name in terms[0]}
        out["kl"] = losses.kl_by_item(posterior.mean.float(), posterior.logvar.float(), voxels.cu_seqlens)
        weights = self.loss
        out["loss"] = sum_weighted(out, weights)
        return out

    def object_losses(self, gaussians: Gaussians, views: Views, background: Tensor) -> dict[str, Tensor]:
        """The losses of one object over its views: scalars by name."""
        with torch.autocast(background.device.type, enabled=False):
            gaussians = gaussians.to(dtype=torch.float32)
            if not all_finite(gaussians):
                return self.not_a_number(gaussians)
            drawn, target = drawn_and_true(gaussians, views, background)
            squared = losses.l2(drawn, target)
            terms = {
                "l1": losses.l1(drawn, target).mean(),
                "l2": squared.mean(),
                "ssim": dissimilarity(drawn, target, views.alphas)
                if self.loss.ssim
                else squared.new_zeros(()),
                "volume": losses.volume(gaussians),
                "opacity": losses.transparency(gaussians),
                "psnr": -10 * torch.log10(squared.detach().clamp(min=1e-10)).mean(),
            }
            if self.loss.edges:
                terms["edges"] = losses.edges(drawn, target).mean()
            if self.loss.lpips and self.perceptual[0] is not None:
                terms["lpips"] = self.perceptual[0].to(drawn.device)(drawn.clamp(0, 1), target).mean()
        return terms

    def not_a_number(self, gaussians: Gaussians) -> dict[str, Tensor]:
        """The losses of Gaussians that cannot be drawn: NaN, by which the training loop stops and names the asset.

        They depend on the networks as any loss does, so that no process waits for another's gradients.
        """
        tensors = (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.sh)
        value = torch.stack([tensor.sum() for tensor in tensors]).sum() * torch.nan
        names = ["l1", "l2", "ssim", "volume", "opacity", "psnr"]
        names += ["edges"] if self.loss.edges else []
        names += ["lpips"] if self.loss.lpips and self.perceptual[0] is not None else []
        return dict.fromkeys(names, value)

    def noise(self, voxels: SparseVoxels, ids: tuple[str, ...], randomness: Any) -> Tensor:
        """ε of every voxel, drawn an asset at a time."""
        shape = [(n, self.encoder.config.latent_channels) for n in voxels.cu_seqlens.diff().tolist()]
        drawn = [
            torch.randn(s, generator=randomness.generator(i, "latents"))
            for s, i in zip(shape, ids, strict=True)
        ]
        return torch.cat(drawn).to(voxels.feats.device)

    def size_at(self, step: int) -> int | None:
        """Pixels a side at ``step``; None for the size that views are loaded in."""
        current = None
        for start, size in self.sizes:
            if step >= start:
                current = size
        return current


def all_finite(gaussians: Gaussians) -> bool:
    """Whether no parameter is NaN or infinite: what the rasteriser asks for."""
    tensors = (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.sh)
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def of_asset(views: Views, index: int, per_asset: int) -> Views:
    """The views of one asset of a batch."""
    return views.select(range(index * per_asset, (index + 1) * per_asset))


def drawn_and_true(gaussians: Gaussians, views: Views, background: Tensor) -> tuple[Tensor, Tensor]:
    """Renderings [V, H, W, 3] from the cameras of ``views``, and the views themselves, over one colour."""
    cameras = (views.viewmats, views.Ks, views.width, views.height)
    return render(gaussians, *cameras, background=background).colors, views.composite(background)


def random_backgrounds(ids: Sequence[str], randomness: Any) -> Tensor:
    """A colour [B, 3] for each asset, so that what is transparent cannot pass for white."""
    return torch.stack([torch.rand(3, generator=randomness.generator(i, "background")) for i in ids])


def dissimilarity(images: Tensor, targets: Tensor, alphas: Tensor) -> Tensor:
    """Mean of 1 - SSIM over views, computed where the object is: all around it both are plain background, and the
    difference zero, or as small as a stray Gaussian's."""
    seen = alphas.amax(0) > 0
    rows, columns = seen.any(1).nonzero()[:, 0], seen.any(0).nonzero()[:, 0]
    if not len(rows):
        return 1 - losses.ssim(images, targets).mean()
    margin = losses.WINDOW
    y = slice(max(int(rows[0]) - margin, 0), int(rows[-1]) + 1 + margin)
    x = slice(max(int(columns[0]) - margin, 0), int(columns[-1]) + 1 + margin)
    images, cropped = images[:, y, x], targets[:, y, x]
    share = images.shape[1] * images.shape[2] / (targets.shape[1] * targets.shape[2])
    return share * (1 - losses.ssim(images, cropped).mean())


def sum_weighted(terms: dict[str, Tensor], weights: Any) -> Tensor:
    """Σ weight · term over the terms that have a weight: a field of ``weights`` of the same name."""
    chosen = [getattr(weights, name) * value for name, value in terms.items() if hasattr(weights, name)]
    return torch.stack(chosen).sum(0)
