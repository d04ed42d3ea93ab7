"""Whether a generated asset can be recognised as what its photo shows, among the assets of all photos.

photos ─▶ cut-outs ─ box-normalised ─▶ silhouettes, features ─┐
                                                              ├─▶ matrix [photos, assets] ─▶ own score, share first
assets ─▶ renderings ─ box-normalised ─▶ silhouettes, features┘

Box-normalised: cropped to the bounding box of what is more than half opaque, scaled so that the longer side fills the
square, and centred. So neither the camera's distance nor the place in the picture counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.evaluation.summary import bootstrap_mean
from diff2to3.gaussians.render import render_pictures
from diff2to3.metrics.image import delta_e_2000, foreground_psnr, srgb_to_lab
from diff2to3.photo.maps import MapNetwork, stacked_maps
from diff2to3.types import Gaussians
from diff2to3.views.cameras import look_at
from diff2to3.views.photo_frame import PhotoCamera

#: Side of box-normalised silhouettes, and of pictures that features are computed of.
SILHOUETTE_SIDE, PICTURE_SIDE = 64, 128
#: Side of the renderings that both are cut from.
RENDER_SIDE = 160
#: The 72 views: degrees of elevation, and how many azimuths at each.
ELEVATIONS, AZIMUTHS = (0.0, 20.0, 40.0), 24
#: Distance of their cameras, and focal length over the side of the picture: the unit cube fits.
DISTANCE, FOCAL = 3.0, 1.6
#: Degrees of azimuth from the photo's camera at which features are compared.
TURNS = (0.0, 30.0, -30.0)


@dataclass(frozen=True)
class Recognisable:
    """One photo and what was made of it.

    photo   [S, S, 4]: straight colour and alpha of the photo's square crop, in [0, 1]
    camera  of the photo, where the model gives one; None: the best of the 72 views takes its place
    """

    name: str
    photo: Tensor
    gaussians: Gaussians
    camera: PhotoCamera | None = None


def box_normalised(picture: Tensor, side: int, background: float = 0.5) -> Tensor:
    """A picture [H, W, 4] with straight alpha → [side, side, 4], its object filling the square along its longer side;
    colours over ``background``. InputError where nothing is more than half opaque.
    """
    solid = picture[..., 3] > 0.5
    rows, columns = solid.any(1).nonzero()[:, 0], solid.any(0).nonzero()[:, 0]
    if not len(rows):
        raise InputError("picture: nothing in it is more than half opaque")
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    longer = max(bottom - top, right - left)
    ys = (torch.arange(side) + 0.5) / side * longer - longer / 2 + (top + bottom) / 2
    xs = (torch.arange(side) + 0.5) / side * longer - longer / 2 + (left + right) / 2
    height, width = solid.shape
    grid = torch.stack(torch.meshgrid(2 * ys / height - 1, 2 * xs / width - 1, indexing="ij")[::-1], -1)
    layers = torch.cat([picture[..., :3] * picture[..., 3:], picture[..., 3:]], -1).permute(2, 0, 1)[None]
    # averaged down first where the object is larger than the square, so that nothing is skipped
    factor = max(1, round(longer / side))
    if factor > 1:
        padding = (0, -width % factor, 0, -height % factor)
        layers = F.avg_pool2d(F.pad(layers, padding), factor)
        grid = (grid + 1) * grid.new_tensor(
            [width / (width + padding[1]), height / (height + padding[3])]
        ) - 1
    seen = F.grid_sample(layers, grid[None].to(layers), align_corners=False)[0].permute(1, 2, 0)
    return torch.cat([seen[..., :3] + background * (1 - seen[..., 3:]), seen[..., 3:]], -1)


def cameras_around() -> tuple[Tensor, Tensor]:
    """The 72 views: viewmats [72, 4, 4] and intrinsics [72, 3, 3] of pictures of RENDER_SIDE."""
    eyes = []
    for elevation in np.radians(ELEVATIONS):
        for azimuth in np.radians(np.arange(AZIMUTHS) * 360 / AZIMUTHS - 90):
            across = DISTANCE * math.cos(elevation)
            eyes.append(
                [across * math.cos(azimuth), across * math.sin(azimuth), DISTANCE * math.sin(elevation)]
            )
    focal = FOCAL * RENDER_SIDE
    K = torch.tensor([[focal, 0.0, RENDER_SIDE / 2], [0.0, focal, RENDER_SIDE / 2], [0.0, 0.0, 1.0]])
    return look_at(np.array(eyes)), K.expand(len(eyes), 3, 3)


@torch.no_grad()
def silhouettes_around(gaussians: Gaussians) -> Tensor:
    """Box-normalised silhouettes bool [72, 64, 64]; all false in a view that shows nothing."""
    _, alphas = render_pictures(gaussians, *cameras_around(), RENDER_SIDE, RENDER_SIDE)
    return torch.stack([silhouette(alpha) for alpha in alphas])


def silhouette(alpha: Tensor) -> Tensor:
    """An alpha [H, W] → its box-normalised silhouette bool [64, 64]."""
    if not bool((alpha > 0.5).any()):
        return torch.zeros(SILHOUETTE_SIDE, SILHOUETTE_SIDE, dtype=torch.bool)
    picture = torch.cat([alpha.new_zeros(*alpha.shape, 3), alpha[..., None]], -1)
    return box_normalised(picture, SILHOUETTE_SIDE)[..., 3] > 0.5


def silhouette_scores(photos: Tensor, assets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """IoU of photos' silhouettes bool [P, 64, 64] with the best of each asset's views bool [V, 64, 64].

    Returns:
        scores [P, A], and the view that is best, int [P, A].
    """
    flat = photos.flatten(1).float()
    scores, views = [], []
    for asset in assets:
        other = asset.flatten(1).float()
        both = flat @ other.T
        either = flat.sum(1)[:, None] + other.sum(1)[None] - both
        best = (both / either.clamp(min=1)).max(1)
        scores.append(best.values)
        views.append(best.indices)
    return torch.stack(scores, 1), torch.stack(views, 1)


def turned_about_z(viewmat: Tensor, degrees: float) -> Tensor:
    """The camera [4, 4] that stands ``degrees`` farther around the z axis."""
    angle = math.radians(degrees)
    turn = torch.eye(4, dtype=viewmat.dtype)
    turn[0, 0] = turn[1, 1] = math.cos(angle)
    turn[0, 1], turn[1, 0] = math.sin(angle), -math.sin(angle)
    return viewmat @ turn


@torch.no_grad()
def described(network: MapNetwork, pictures: Tensor) -> Tensor:
    """Box-normalised pictures [V, S, S, 4] over grey → features [V, C]: each channel's mean over the object, of the
    last map of the network.
    """
    alphas = pictures[..., 3]
    # the pictures hold their grey background already
    _, coarse = stacked_maps(network, pictures[..., :3], torch.ones_like(alphas))
    weights = F.adaptive_avg_pool2d(alphas[:, None], (int(coarse.shape[-2]), int(coarse.shape[-1])))
    return (coarse * weights).sum((2, 3)) / weights.sum((2, 3)).clamp(min=1e-6)


def feature_scores(photos: Tensor, assets: Tensor) -> Tensor:
    """Cosine similarities [P, A] of features [P, C] and [A, C], each channel first standardised over all of them: what
    all pictures have in common tells none apart.
    """
    both = torch.cat([photos, assets])
    mean, deviation = both.mean(0), both.std(0).clamp(min=1e-6)
    photos, assets = ((x - mean) / deviation for x in (photos, assets))
    return F.normalize(photos, dim=1) @ F.normalize(assets, dim=1).T


def share_first(scores: Tensor) -> list[float]:
    """1 for each photo [P, P] whose own asset (the diagonal) has the highest score of all, strictly; else 0."""
    others = scores.clone().fill_diagonal_(-math.inf).amax(1)
    return (scores.diagonal() > others).double().tolist()


def mean_color(picture: Tensor) -> Tensor:
    """Mean CIELAB colour [3] of what is more than half opaque in a picture [S, S, 4] over grey."""
    return srgb_to_lab(picture[..., :3][picture[..., 3] > 0.5].double()).mean(0)


def scored(items: Sequence[Recognisable], network: MapNetwork) -> dict[str, Any]:
    """All scores of a set of photos and the assets made of them.

    Returns:
        ``assets``: for each name its numbers; ``summary``: name of a score → mean or median, interval.
    """
    if len(items) < 2:
        raise InputError(f"photos: at least two are needed to tell them apart, got {len(items)}")
    photos = torch.stack([silhouette(item.photo[..., 3]) for item in items])
    views, best = silhouette_scores(photos, [silhouettes_around(item.gaussians) for item in items])
    viewmats, Ks = cameras_around()
    rendered = []
    for index, item in enumerate(items):
        camera = viewmats[int(best[index, index])], Ks[0]
        if item.camera is not None:
            camera = item.camera.viewmat, item.camera.K(RENDER_SIDE)
        rendered.append(pictures_at(item.gaussians, camera))
    seen = torch.stack([box_normalised(item.photo, PICTURE_SIDE) for item in items])
    features = described(network, seen)
    turns = torch.stack([described(network, pictures) for pictures in rendered])  # [A, turns, C]
    likeness = {turn: feature_scores(features, turns[:, i]) for i, turn in enumerate(TURNS)}
    first = {
        "silhouette_first": share_first(views),
        **{
            f"features_first{turn:+.0f}" if turn else "features_first": share_first(s)
            for turn, s in likeness.items()
        },
    }
    rows = []
    for index, item in enumerate(items):
        row: dict[str, Any] = {
            "silhouette_iou": float(views[index, index]),
            **{name: values[index] for name, values in first.items()},
            **colors_of(seen[index], rendered[index][0]),
            **at_camera(item),
        }
        rows.append(row)
    summary = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        if values:
            estimate = bootstrap_mean(values)
            summary[name] = {
                "mean": estimate.value, "median": float(np.median(values)), "low": estimate.low, "high": estimate.high,
            }  # fmt: skip
    return {"assets": {item.name: row for item, row in zip(items, rows, strict=True)}, "summary": summary}


@torch.no_grad()
def pictures_at(gaussians: Gaussians, camera: tuple[Tensor, Tensor]) -> Tensor:
    """Box-normalised renderings [turns, S, S, 4] over grey, at a camera and turned about z."""
    viewmats = torch.stack([turned_about_z(camera[0], turn) for turn in TURNS])
    Ks = camera[1].expand(len(TURNS), 3, 3)
    images, alphas = render_pictures(gaussians, viewmats, Ks, RENDER_SIDE, RENDER_SIDE, background=0.0)
    straight = images / alphas[..., None].clamp(min=1e-3)
    pictures = torch.cat([straight.clamp(0, 1), alphas[..., None]], -1)
    empty = torch.full((PICTURE_SIDE, PICTURE_SIDE, 4), 0.5)
    empty[..., 3] = 0
    return torch.stack(
        [box_normalised(p, PICTURE_SIDE) if bool((p[..., 3] > 0.5).any()) else empty for p in pictures]
    )


def colors_of(photo: Tensor, rendering: Tensor) -> dict[str, float | None]:
    """CIEDE2000 between the mean colours of two pictures [S, S, 4], and the difference of their mean chroma."""
    if not bool((rendering[..., 3] > 0.5).any()):
        return {"color_difference": None, "chroma_difference": None}
    ours, theirs = mean_color(photo), mean_color(rendering)
    return {
        "color_difference": float(delta_e_2000(ours, theirs)),
        "chroma_difference": float((ours[1:].norm() - theirs[1:].norm()).abs()),
    }


@torch.no_grad()
def at_camera(item: Recognisable) -> dict[str, float | None]:
    """PSNR over the object (photo and rendering over mid-grey) and IoU of the silhouettes at the returned camera."""
    if item.camera is None:
        return {"photo_psnr": None, "photo_iou": None}
    side = len(item.photo)
    images, alphas = render_pictures(
        item.gaussians, item.camera.viewmat[None], item.camera.K(side)[None], side, side, background=0.5
    )
    alpha = item.photo[..., 3:]
    photo = item.photo[..., :3] * alpha + 0.5 * (1 - alpha)
    mask, mine = alpha[..., 0] > 0.5, alphas[0] > 0.5
    either = int((mask | mine).sum())
    return {
        "photo_psnr": float(foreground_psnr(images, photo[None], mask[None])[0]),
        "photo_iou": int((mask & mine).sum()) / max(either, 1),
    }
