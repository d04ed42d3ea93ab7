"""One feature set of one object, whichever kind it is: image features or surface statistics, in any mode."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diff2to3.types import Views
from diff2to3.voxels.aggregate import VoxelFeatures, lift, weigh_views
from diff2to3.voxels.providers import SURFACE, FeatureProvider
from diff2to3.voxels.surface import surface_statistics


def lift_features(
    views: Views,
    coords: Tensor,
    resolution: int,
    provider: FeatureProvider | None,
    modes: Sequence[str],
    *,
    depth_tolerance: float = 1.0,
    background: float = 0.5,
    view_chunk: int = 4,
) -> list[VoxelFeatures]:
    """The features of the voxels ``coords`` [N, 3] of the R³ grid, one VoxelFeatures a mode; every view is encoded
    once. ``provider`` None stands for :data:`SURFACE`, whose only mode is ``visible``.

    Raises ValueError as :func:`diff2to3.voxels.aggregate.aggregate_features` and
    :func:`diff2to3.voxels.surface.surface_statistics` do.
    """
    if provider is None:
        if list(modes) != ["visible"]:
            raise ValueError(f"modes: {SURFACE!r} has only 'visible', got {list(modes)}")
        return [surface_statistics(views, coords, resolution)]
    weightings = [weigh_views(views, coords, resolution, mode, depth_tolerance) for mode in modes]
    lifted = lift(views, provider, weightings, background, view_chunk)
    return [VoxelFeatures(f, w.num_views) for f, w in zip(lifted, weightings, strict=True)]
