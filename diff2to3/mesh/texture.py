"""Colours of a mesh from pictures of the Gaussians that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diff2to3.gaussians.render import render
from diff2to3.types import Gaussians

Shade = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
#: Pixels a side of each picture, degrees of view, and how far behind the visible surface a point may still count as
#: seen, in the object's size.
PICTURE, FOV, TOLERANCE = 384, 40.0, 0.03


@dataclass(frozen=True)
class Pictures:
    """colors [V, H, W, 3] over black, alphas and depths [V, H, W] (depth of the surface), viewmats [V, 4, 4], eyes
    [V, 3], one K [3, 3].
    """

    colors: Tensor
    alphas: Tensor
    depths: Tensor
    viewmats: Tensor
    eyes: Tensor
    K: Tensor


def take_pictures(gaussians: Gaussians, num_views: int, center: Tensor, size: float) -> Pictures:
    """Pictures from directions spread evenly over the sphere, in which an object of ``size`` fits."""
    i = torch.arange(num_views, dtype=torch.float64) + 0.5
    height, angle = 1 - 2 * i / num_views, torch.pi * (1 + 5**0.5) * i
    ring = (1 - height**2).sqrt()
    back = torch.stack((ring * angle.cos(), ring * angle.sin(), height), 1)  # from the object to the camera
    eyes = center.double() + 2 * size * back
    down = torch.tensor([0.0, 0, -1], dtype=torch.float64).expand_as(back)
    right = torch.nn.functional.normalize(torch.linalg.cross(down, -back), dim=1)
    true_down = torch.linalg.cross(-back, right)
    rotation = torch.stack((right, true_down, -back), 1)
    viewmats = torch.eye(4, dtype=torch.float64).repeat(num_views, 1, 1)
    viewmats[:, :3, :3] = rotation
    viewmats[:, :3, 3] = -torch.einsum("vij,vj->vi", rotation, eyes)
    focal = PICTURE / 2 / float(np.tan(np.radians(FOV / 2)))
    K = torch.tensor([[focal, 0, PICTURE / 2], [0, focal, PICTURE / 2], [0, 0, 1]], dtype=torch.float64)
    with torch.no_grad():
        shown = render(
            gaussians, viewmats.to(gaussians.means), K.repeat(num_views, 1, 1).to(gaussians.means), PICTURE, PICTURE,
            depth=True,
        )  # fmt: skip
    alphas = shown.alphas.float().cpu()
    assert shown.depths is not None
    depths = shown.depths.float().cpu() / alphas.clamp_min(1e-6)
    return Pictures(shown.colors.float().cpu(), alphas, depths, viewmats.float(), eyes.float(), K.float())


def colors_at(pictures: Pictures, points: Tensor, normals: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """sRGB [P, 3] of surface points and how well they were seen [P]: the mean over the pictures that see a point, by
    the cosine to the normal, so that steep views count little.
    """
    total, weights = torch.zeros(len(points), 3), torch.zeros(len(points))
    for v in range(len(pictures.viewmats)):
        at = points @ pictures.viewmats[v, :3, :3].T + pictures.viewmats[v, :3, 3]
        pixel = at[:, :2] / at[:, 2:].clamp_min(1e-6) * pictures.K[0, 0] + pictures.K[0, 2]
        grid = (pixel / PICTURE * 2 - 1)[None, None]
        planes = torch.cat(
            (pictures.colors[v], pictures.alphas[v][..., None], pictures.depths[v][..., None]), -1
        )
        seen = torch.nn.functional.grid_sample(planes.permute(2, 0, 1)[None], grid, align_corners=False)[
            0, :, 0
        ].T
        toward = torch.nn.functional.normalize(pictures.eyes[v] - points, dim=1)
        cosine = (toward * normals).sum(1).clamp_min(0)
        near = torch.exp(-(((at[:, 2] - seen[:, 4]) / (TOLERANCE * size)) ** 2))
        weight = cosine**3 * near * (seen[:, 3] > 0.3)
        color = seen[:, :3] / seen[:, 3:4].clamp_min(1e-3)
        total += weight[:, None] * color
        weights += weight
    return (total / weights.clamp_min(1e-12)[:, None]).clamp(0, 1), weights


def texels(uvs: np.ndarray, faces: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The texels whose centres lie in a triangle: flat index [T] (row 0 is the top), triangle [T], barycentric
    coordinates [T, 3].
    """
    corners = uvs[faces] * [side, side]
    corners[..., 1] = side - corners[..., 1]
    low = np.floor(corners.min(1) - 0.5).astype(np.int64).clip(0, side - 1)
    high = np.ceil(corners.max(1) - 0.5).astype(np.int64).clip(0, side - 1)
    size = high - low + 1
    counts = size.prod(1)
    face = np.repeat(np.arange(len(faces)), counts)
    inside = np.arange(len(face)) - np.repeat(np.cumsum(counts) - counts, counts)
    x = low[face, 0] + inside % size[face, 0]
    y = low[face, 1] + inside // size[face, 0]
    a, b, c = (corners[face, i] for i in range(3))
    px, py = x + 0.5, y + 0.5
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    with np.errstate(divide="ignore", invalid="ignore"):
        u = ((b[:, 0] - px) * (c[:, 1] - py) - (b[:, 1] - py) * (c[:, 0] - px)) / area
        v = ((c[:, 0] - px) * (a[:, 1] - py) - (c[:, 1] - py) * (a[:, 0] - px)) / area
    weights = np.stack((u, v, 1 - u - v), 1)
    keep = np.isfinite(weights).all(1) & (weights >= -1e-6).all(1)
    return (y * side + x)[keep], face[keep], weights[keep].clip(0, 1)


def fill_gutters(picture: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Colours [H, W, 3] for texels that no triangle covers, from those around: coarser and coarser means, of which the
    finest that is known is taken. The side must be a power of two.
    """
    levels = [(picture * known[..., None], known.astype(np.float64))]
    while levels[-1][1].shape[0] > 1:
        color, weight = levels[-1]
        half = weight.shape[0] // 2
        levels.append(
            (
                color.reshape(half, 2, half, 2, 3).sum((1, 3)),
                weight.reshape(half, 2, half, 2).sum((1, 3)),
            )
        )
    filled = levels[-1][0] / levels[-1][1][..., None].clip(1e-12)
    for color, weight in reversed(levels[:-1]):
        up = filled.repeat(2, 0).repeat(2, 1)
        filled = np.where(weight[..., None] > 0, color / weight[..., None].clip(1e-12), up)
    return np.asarray(filled)


def bake(uvs: np.ndarray, faces: np.ndarray, side: int, shade: Shade) -> np.ndarray:
    """A texture uint8 [side, side, 3]. ``shade`` takes triangles [T] and barycentric coordinates [T, 3] to colours
    [T, 3] and how far they are to be trusted [T].
    """
    at, face, weights = texels(uvs, faces, side)
    colors, trust = shade(face, weights)
    picture, known = np.zeros((side * side, 3)), np.zeros(side * side, bool)
    good = trust > 1e-3
    picture[at[good]], known[at[good]] = colors[good], True
    if not known.any():
        picture[at], known[at] = colors, True
    filled = fill_gutters(picture.reshape(side, side, 3), known.reshape(side, side))
    return np.round(filled.clip(0, 1) * 255).astype(np.uint8)
