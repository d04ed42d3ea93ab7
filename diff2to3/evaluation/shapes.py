"""Shapes as they are compared: points on a surface, and the cells of a voxel grid that it crosses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diff2to3.evaluation.protocol import Protocol
from diff2to3.metrics.geometry import sample_surface, surface_distance, voxel_iou
from diff2to3.types import Gaussians, Mesh
from diff2to3.voxels.voxelise import voxelise

#: A Gaussian counts as a point of the shape from this opacity on.
SOLID = 0.5


@dataclass(frozen=True)
class Shape:
    """points float32 [P, 3] in the object frame; coords int32 [N, 3], cells of the protocol's grid. On the CPU."""

    points: Tensor
    coords: Tensor


def shape_of_mesh(rules: Protocol, mesh: Mesh, asset_id: str) -> Shape:
    """Of an asset: ``rules.shape_points`` points, evenly by area."""
    points = sample_surface(mesh, rules.shape_points, rules.surface_generator(asset_id))
    return Shape(points, torch.from_numpy(voxelise(mesh.triangles, rules.grid)))


def shape_of_gaussians(
    rules: Protocol, gaussians: Gaussians, seed: int, coords: Tensor | None = None
) -> Shape:
    """Of Gaussians: the means of those that are solid (at most ``rules.max_points``, chosen with ``seed``), and the
    cells that these lie in, unless ``coords`` int [N, 3] are given.
    """
    points = gaussians.means[gaussians.opacities >= SOLID].detach().cpu().float()
    if rules.max_points is not None and len(points) > rules.max_points:
        chosen = np.random.default_rng(seed).choice(len(points), rules.max_points, replace=False)
        points = points[torch.from_numpy(np.sort(chosen))]
    if coords is None:
        cells = ((points + 0.5) * rules.grid).floor().clamp(0, rules.grid - 1)
        coords = torch.unique(cells.int(), dim=0)
    return Shape(points, coords.cpu())


def compare_shapes(rules: Protocol, ours: Shape, truth: Shape) -> dict[str, float]:
    """chamfer, f_score and voxel_iou. Without a point, ours is ``rules.far`` away and has F-score 0."""
    values = {"voxel_iou": voxel_iou(ours.coords, truth.coords), "chamfer": rules.far, "f_score": 0.0}
    if len(ours.points):
        distance = surface_distance(ours.points, truth.points, rules.f_threshold)
        values |= {"chamfer": distance.chamfer, "f_score": distance.f_score}
    return values
