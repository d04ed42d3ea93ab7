"""Metrics of shapes: between voxel grids, and between points sampled on surfaces. Lengths are in object units."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diff2to3.errors import MissingDependencyError
from diff2to3.types import Mesh


def voxel_iou(coords: Tensor, other: Tensor) -> float:
    """Intersection over union of two sets of voxels, int [N, 3] and [M, 3], of one grid and without
    duplicates; 1 where both are empty.
    """
    for name, tensor in (("coords", coords), ("other", other)):
        if tensor.ndim != 2 or tensor.shape[1] != 3 or tensor.is_floating_point():
            raise ValueError(f"{name}: expected integers [N, 3], got {tensor.dtype} {list(tensor.shape)}")
    both = torch.cat([coords.long(), other.to(coords.device).long()])
    if len(both) == 0:
        return 1.0
    if any(len(torch.unique(t, dim=0)) != len(t) for t in (coords, other)):
        raise ValueError("coords, other: duplicate voxels")
    union = len(torch.unique(both, dim=0))
    return (len(both) - union) / union


class SurfaceDistance(NamedTuple):
    """Between two point sets A (ours) and B (the truth); see :func:`surface_distance`.

    chamfer    (mean distance A→B + mean distance B→A) / 2
    precision  share of A within the threshold of B
    recall     share of B within the threshold of A
    f_score    their harmonic mean; 0 where both are 0
    """

    chamfer: float
    precision: float
    recall: float
    f_score: float


def surface_distance(points: Tensor, truth: Tensor, threshold: float = 0.01) -> SurfaceDistance:
    """Chamfer distance (of distances, not their squares) and F-score between points [N, 3] and [M, 3].

    ``threshold`` is in object units: 0.01 of an asset whose longest side is 1. Nearest neighbours by SciPy's
    k-d tree.

    Raises:
        ValueError: an empty set, another shape, or NaN.
    """
    try:
        from scipy.spatial import cKDTree
    except ImportError as error:
        raise MissingDependencyError("scipy", "eval") from error
    arrays = []
    for name, tensor in (("points", points), ("truth", truth)):
        if tensor.ndim != 2 or tensor.shape[1] != 3 or len(tensor) == 0:
            raise ValueError(f"{name}: expected [N, 3] with N >= 1, got {list(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: NaN or infinite coordinates")
        arrays.append(tensor.detach().cpu().double().numpy())
    if threshold <= 0:
        raise ValueError(f"threshold: expected a positive length, got {threshold}")
    ours, theirs = arrays
    to_truth = cKDTree(theirs).query(ours)[0]
    from_truth = cKDTree(ours).query(theirs)[0]
    precision, recall = float((to_truth <= threshold).mean()), float((from_truth <= threshold).mean())
    f_score = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
    return SurfaceDistance(float(to_truth.mean() + from_truth.mean()) / 2, precision, recall, f_score)


def sample_surface(mesh: Mesh, count: int, generator: np.random.Generator) -> Tensor:
    """``count`` points spread evenly by area over a mesh's triangles: float32 [count, 3].

    ValueError for a mesh without area.
    """
    corners = mesh.triangles.astype(np.float64)
    edges = corners[:, 1:] - corners[:, :1]
    areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) / 2
    if not areas.sum() > 0:
        raise ValueError(f"mesh {mesh.name!r}: has no area to sample points on")
    faces = generator.choice(len(areas), count, p=areas / areas.sum())
    u, v = generator.random((2, count))
    flip = u + v > 1
    u, v = np.where(flip, 1 - u, u), np.where(flip, 1 - v, v)
    points = corners[faces, 0] + u[:, None] * edges[faces, 0] + v[:, None] * edges[faces, 1]
    return torch.from_numpy(points.astype(np.float32))
