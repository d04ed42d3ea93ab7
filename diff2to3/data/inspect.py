"""A contact sheet of a prepared dataset: for a person to see that views, voxels and features are right.

One row an asset: views of every set, then the voxels through the camera of the first set's last view, in the
colours of a checkerboard (geometry), of the lifted RGB where there is such a set, and of the features'
principal components. Voxels must cover the object as that view shows it, and features must change where the
picture does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diff2to3.data.pictures import shrink
from diff2to3.data.plan import PlannedAsset
from diff2to3.data.store import AssetStore
from diff2to3.errors import InputError
from diff2to3.types import Views

_BACKGROUND = 0.82
_LABEL_HEIGHT = 12
_GAP = 2


def contact_sheet(
    store: AssetStore,
    assets: Sequence[PlannedAsset],
    *,
    cell: int = 128,
    views_per_set: int = 3,
    columns: int = 1,
) -> Image.Image:
    """The sheet, ``columns`` assets beside each other. Stages that were not prepared are left out."""
    if not assets:
        raise InputError(f"{store.root}: no complete asset to show")
    principal = _common_components(store, assets)
    rows = [_panels(store, asset, cell, views_per_set, principal) for asset in assets]
    width = max(len(row) for row in rows) * (cell + _GAP) + 3 * _GAP
    height = cell + _LABEL_HEIGHT + _GAP
    per_column = -(-len(rows) // columns)
    sheet = Image.new("RGB", (width * columns, height * per_column + _LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        for i, (title, _) in enumerate(rows[0]):
            draw.text((column * width + i * (cell + _GAP) + 2, 0), title, fill="grey")
    for number, (asset, row) in enumerate(zip(assets, rows, strict=True)):
        left, top = number // per_column * width, number % per_column * height + _LABEL_HEIGHT
        draw.text((left + 2, top), _label(store, asset), fill="black")
        for i, (_, panel) in enumerate(row):
            pixels = (panel.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            sheet.paste(Image.fromarray(pixels), (left + i * (cell + _GAP), top + _LABEL_HEIGHT))
    return sheet


def choose_assets(store: AssetStore, count: int, split: str | None = None) -> list[PlannedAsset]:
    """``count`` assets spread evenly over those that are complete."""
    complete = store.assets(split)
    picks = np.unique(np.linspace(0, len(complete) - 1, min(count, len(complete))).round().astype(int))
    return [complete[i] for i in picks]


def draw_voxels(
    coords: Tensor, colors: Tensor, resolution: int, viewmat: Tensor, K: Tensor, size: int
) -> Tensor:
    """Voxels [N, 3] as squares of their projected size, far ones first: sRGB [size, size, 3]."""
    centers = (coords.double() + 0.5) / resolution - 0.5
    in_camera = centers @ viewmat[:3, :3].double().T + viewmat[:3, 3].double()
    z = in_camera[:, 2]
    pixels = in_camera[:, :2] / z[:, None] * K[0, 0] + K[:2, 2].double()
    half = 0.6 * float(K[0, 0]) / resolution / z  # a little over half a voxel: no gaps between neighbours
    canvas = np.full((size, size, 3), _BACKGROUND, np.float32)
    low = (pixels - half[:, None]).round().clamp(0, size).long().tolist()
    high = (pixels + half[:, None]).round().clamp(0, size).long().tolist()
    colors_list = colors.float().numpy()
    for i in torch.argsort(z, descending=True).tolist():
        (x0, y0), (x1, y1) = low[i], high[i]
        canvas[y0:y1, x0:x1] = colors_list[i]
    return torch.from_numpy(canvas)


def principal_components(feats: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and the three directions [C, 3] of greatest variance, scaled so that nearly all project to
    [-1, 1]."""
    x = feats.double()
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
    basis = vectors.flip(1)[:, :3]
    basis = basis * torch.where(basis.sum(0) < 0, -1.0, 1.0)  # an eigenvector's sign is arbitrary
    basis = torch.nn.functional.pad(basis, (0, 3 - basis.shape[1]))
    spread = (((x - mean) @ basis).square().mean(0)).sqrt().clamp(min=1e-8)
    return mean, basis / (2.5 * spread)


def _panels(
    store: AssetStore,
    asset: PlannedAsset,
    cell: int,
    views_per_set: int,
    principal: dict[str, tuple[Tensor, Tensor]],
) -> list[tuple[str, Tensor]]:
    """(title, picture) of each panel of one asset."""
    panels: list[tuple[str, Tensor]] = []
    camera = None
    for name in _items(store, "views"):
        count = int(store.info(asset, f"views_{name}")["num_views"])
        few = min(views_per_set, count)
        chosen = [int((i + 0.5) * count / few) for i in range(few)]  # sets begin right below the object
        views = _fit(store.views(asset, name, chosen), cell)
        shown = zip(chosen, views.composite(_BACKGROUND), strict=True)
        panels += [(f"{name} {i}", picture) for i, picture in shown]
        camera = camera or (views.viewmats[-1], views.Ks[-1])  # the last shown, from above
    if camera is None:
        return panels
    for item in _items(store, "voxels"):
        resolution = int(item)
        coords = store.coords(asset, resolution)
        checker = 0.35 + 0.4 * (coords.sum(1) % 2).float()[:, None].expand(-1, 3)
        height = (coords[:, 2:].float() + 0.5) / resolution
        drawn = draw_voxels(coords, checker * (0.6 + 0.4 * height), resolution, *camera, cell)
        panels.append((f"voxels {resolution}", drawn))
    for name, (mean, basis) in principal.items():
        voxels = store.features(asset, [name])
        colors = voxels.feats
        if colors.shape[1] != 3:
            colors = 0.5 + 0.5 * (colors.double() - mean) @ basis
        drawn = draw_voxels(voxels.coords[:, 1:], colors.clamp(0, 1), voxels.resolution, *camera, cell)
        panels.append((name, drawn))
    return panels


def _items(store: AssetStore, kind: str) -> list[str]:
    """The items of ``kind`` that are open: grids by size, others by name."""
    items = [stage.partition("_")[2] for stage in store.stages if stage.startswith(f"{kind}_")]
    return sorted(items, key=lambda item: (int(item) if item.isdigit() else 0, item))


def _fit(views: Views, cell: int) -> Views:
    """Views at ``cell`` pixels a side, or as near above it as a whole factor gives, cut from the nearest
    pixels."""
    factor = max(views.width // cell, 1)
    views = shrink(views, views.width // factor) if views.width % factor == 0 else views
    if views.width == cell:
        return views
    index = ((torch.arange(cell) + 0.5) * views.width / cell).long()
    scale = torch.tensor([cell / views.width, cell / views.width, 1.0])[:, None]
    images = views.images[:, index][:, :, index]
    return Views(images, views.alphas[:, index][:, :, index], views.viewmats, views.Ks * scale)


def _common_components(store: AssetStore, assets: Sequence[PlannedAsset]) -> dict[str, tuple[Tensor, Tensor]]:
    """Per feature set and mode, components over all the sheet's assets: one colour means one feature
    throughout."""
    names = [
        f"{item}.{mode}"
        for item in _items(store, "features")
        for mode in store.info(assets[0], f"features_{item}")["modes"]
    ]
    return {
        name: principal_components(torch.cat([store.features(asset, [name]).feats for asset in assets]))
        for name in names
    }


def _label(store: AssetStore, asset: PlannedAsset) -> str:
    parts = [asset.id, asset.split]
    for name in _items(store, "views")[:1]:
        parts.append(f"{store.info(asset, f'views_{name}')['faces']} faces")
    for item in _items(store, "voxels"):
        parts.append(f"{store.info(asset, f'voxels_{item}')['num_voxels']} voxels at {item}")
    return "   ".join(part for part in parts if part)
