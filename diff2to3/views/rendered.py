"""What a renderer of meshes gives back, and the one that every other builds on: rays on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from diff2to3.types import Mesh, Views
from diff2to3.views.config import RenderConfig

if TYPE_CHECKING:
    from diff2to3.views.tracer import Frames


@dataclass(frozen=True)
class RenderedViews(Views):
    """:class:`Views` and what else the pass gave; each is None unless ``RenderConfig.outputs`` asked for it.

    depths, normals, points and triangle_ids belong to the ray through the pixel's centre and to the first
    surface on it that is at least half opaque; alphas and images are averages over the pixel. So a pixel at
    an outline may have alpha and no depth.

    normals       [V, H, W, 3]     unit shading normals in the object frame, on the camera's side; 0 elsewhere
    points        [V, H, W, 3]     where the ray meets the surface, in the object frame; 0 where it meets none
    triangle_ids  int32 [V, H, W]  rows of ``Mesh.faces``; -1 where nothing is seen
    renderer      which renderer made the views, with its version
    """

    normals: Tensor | None = None
    points: Tensor | None = None
    triangle_ids: Tensor | None = None
    renderer: str = ""


class MeshRenderer(Protocol):
    """Renders views of one mesh; keeps what views share."""

    def render(self, viewmats: Tensor, Ks: Tensor, width: int, height: int) -> RenderedViews: ...


class RaycastRenderer:
    """Embree on the CPU; see :mod:`diff2to3.views.tracer`."""

    def __init__(self, mesh: Mesh, config: RenderConfig) -> None:
        from diff2to3.views.tracer import Tracer

        self._tracer: Tracer = Tracer(mesh, config)

    def render(self, viewmats: Tensor, Ks: Tensor, width: int, height: int) -> RenderedViews:
        from diff2to3.views.tracer import Camera, Frames

        check_cameras(viewmats, Ks, width, height)
        frames = Frames(len(viewmats), height, width, self._tracer.config.outputs)
        for view, (viewmat, K) in enumerate(zip(viewmats.cpu().numpy(), Ks.cpu().numpy(), strict=True)):
            self._tracer.render(Camera.of(viewmat, K, width, height), frames, view)
        return pack_frames(frames, viewmats, Ks, self.name)

    @property
    def name(self) -> str:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return f"raycast (embreex {version('embreex')})"
        except PackageNotFoundError:
            return "raycast (embreex)"


def check_cameras(viewmats: Tensor, Ks: Tensor, width: int, height: int) -> None:
    """Raise ValueError unless the cameras of a render call make sense together."""
    if viewmats.ndim != 3 or viewmats.shape[1:] != (4, 4) or len(viewmats) == 0:
        raise ValueError(f"viewmats: expected [V, 4, 4] with V >= 1, got {list(viewmats.shape)}")
    if Ks.shape != (len(viewmats), 3, 3):
        raise ValueError(f"Ks: expected [{len(viewmats)}, 3, 3], got {list(Ks.shape)}")
    if width < 1 or height < 1:
        raise ValueError(f"width, height: expected positive numbers, got {width} x {height}")
    if not (bool(torch.isfinite(viewmats).all()) and bool(torch.isfinite(Ks).all())):
        raise ValueError("viewmats, Ks: expected finite numbers")


def pack_frames(frames: Frames, viewmats: Tensor, Ks: Tensor, name: str) -> RenderedViews:
    """The arrays of a renderer as views, without a copy."""

    def tensor(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array)

    return RenderedViews(
        images=torch.from_numpy(frames.images),
        alphas=torch.from_numpy(frames.alphas),
        viewmats=viewmats.cpu().float(),
        Ks=Ks.cpu().float(),
        depths=tensor(frames.depths),
        normals=tensor(frames.normals),
        points=tensor(frames.points),
        triangle_ids=tensor(frames.triangle_ids),
        renderer=name,
    )
