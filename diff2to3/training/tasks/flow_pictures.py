"""What generated latents decode to: scores against the truth, and pictures to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diff2to3.checkpoint import MODEL_FILE, read_bundle
from diff2to3.data.plan import PlannedAsset
from diff2to3.data.store import AssetStore, occupancy
from diff2to3.errors import InputError
from diff2to3.gaussians.render import render
from diff2to3.metrics.image import psnr
from diff2to3.networks import frozen_network
from diff2to3.types import Gaussians, SparseVoxels

#: Views of a generated object that are compared with the stored ones.
SCORED_VIEWS = (0, 5, 10)


class Judge:
    """The decoder of one stage's latents, from a bundle."""

    def __init__(self, bundle: str, stage: str, threshold: float = 0.0) -> None:
        folder = Path(bundle)
        info = read_bundle(folder)
        name = "structure_decoder" if stage == "structure" else "decoder"
        if name not in info.networks:
            raise InputError(
                f"{folder / MODEL_FILE}: no network {name!r}; data.bundle needs the {stage} decoder"
            )
        entry = info.networks[name]
        kind = "StructureDecoder" if stage == "structure" else "Decoder"
        self.decoder: Any = frozen_network(folder, name, entry, (kind,))
        self.stage, self.threshold = stage, threshold
        self.scale = 1  # cells of the grid to one of the latents', on each axis
        if stage == "structure":
            self.scale = 2 ** (len(entry.config["channels"]) - 1) * int(entry.config.get("fold", 1))

    def grid_resolution(self, resolution: int) -> int:
        """Of the grid that latents on one of ``resolution`` decode to."""
        return resolution * self.scale

    def stages(self, resolution: int) -> list[str]:
        """What a store needs for the truth about latents on a grid of ``resolution``."""
        return (
            [f"voxels_{self.grid_resolution(resolution)}"] if self.stage == "structure" else ["views_target"]
        )

    def occupied(self, latents: Tensor) -> Tensor:
        """Dense latents → bool [B, R, R, R]."""
        return self.decoder.to(latents.device)(latents)[:, 0] > self.threshold

    def objects(self, voxels: SparseVoxels) -> list[Gaussians]:
        return self.decoder.to(voxels.feats.device)(voxels)

    def scores(
        self, store: AssetStore, assets: list[PlannedAsset], latents: Tensor | SparseVoxels, made: Tensor
    ) -> dict[str, list[float]]:
        """Structure: IoU of occupied cells. Latents: PSNR of renderings of the true voxels."""
        if not isinstance(latents, SparseVoxels):
            grids = self.occupied(made).cpu()
            truths = self.truths(store, assets, grids.shape[-1])
            return {"iou": [iou(g, t) for g, t in zip(grids, truths, strict=True)]}
        values = []
        for asset, gaussians in zip(assets, self.objects(latents.with_feats(made)), strict=True):
            views = store.views(asset, "target", SCORED_VIEWS).to(made.device)
            drawn = render(gaussians, views.viewmats, views.Ks, views.width, views.height, background=1.0)
            values.append(float(psnr(drawn.colors.clamp(0, 1), views.composite(1.0)).mean()))
        return {"psnr": values}

    def truths(self, store: AssetStore, assets: list[PlannedAsset], resolution: int) -> list[Tensor]:
        """Occupancy bool [R, R, R] of every asset."""
        return [occupancy(store.coords(asset, resolution), resolution) for asset in assets]

    def picture(
        self, store: AssetStore, assets: list[PlannedAsset], latents: Tensor | SparseVoxels, made: Tensor
    ) -> Tensor:
        """[H, W, 3]: a column an asset, truth above generated."""
        columns = []
        if not isinstance(latents, SparseVoxels):
            grids = self.occupied(made).cpu()
            for grid, truth in zip(grids, self.truths(store, assets, grids.shape[-1]), strict=True):
                columns.append(torch.cat([shade(truth), shade(grid)]))
            return torch.cat(columns, 1)
        for asset, gaussians in zip(assets, self.objects(latents.with_feats(made)), strict=True):
            views = store.views(asset, "target", SCORED_VIEWS[:2]).to(made.device)
            drawn = render(gaussians, views.viewmats, views.Ks, views.width, views.height, background=1.0)
            truth = torch.cat(list(views.composite(1.0)))
            columns.append(torch.cat([truth, torch.cat(list(drawn.colors.clamp(0, 1)))]))
        return torch.cat(columns, 1).cpu()


def iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boolean grids; 1 where both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def shade(grid: Tensor, zoom: int = 3) -> Tensor:
    """[R, R, R] seen along x, y and z: nearer cells are brighter. [3 R zoom, R zoom, 3]."""
    r = grid.shape[0]
    pictures = []
    for axis in range(3):
        depth = torch.arange(r, 0, -1).reshape([-1 if a == axis else 1 for a in range(3)])
        front = (grid * depth).amax(axis).float() / r
        pictures.append(front.T.flip(0))
    stacked = torch.cat(pictures).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    return stacked[..., None].expand(-1, -1, 3)
