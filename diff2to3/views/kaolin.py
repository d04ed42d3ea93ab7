"""Visibility on the GPU by NVIDIA Kaolin's rasteriser (Apache 2.0); light and colour as on the CPU.

Only the index of the nearest face at every sample is taken from Kaolin. Where the ray meets that face is
computed here, so that both renderers agree to rounding. Kaolin compares depths that it interpolates
linearly in the image, which is right for inverse depths; those are what it is given. It does not clip, so
views with geometry at or behind the camera are traced on the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from diff2to3.errors import MissingDependencyError
from diff2to3.types import Mesh
from diff2to3.views.config import RenderConfig
from diff2to3.views.raycast import Hits
from diff2to3.views.rendered import RaycastRenderer
from diff2to3.views.tracer import Camera, Frames, Tile, Tracer

_NEAR = 1e-2
_HOW = "see https://kaolin.readthedocs.io/en/latest/notes/installation.html"


class KaolinRenderer(RaycastRenderer):
    """:class:`RaycastRenderer` whose first hits come from the GPU."""

    def __init__(self, mesh: Mesh, config: RenderConfig, device: torch.device | str = "cuda") -> None:
        try:
            import kaolin
        except ImportError:
            raise MissingDependencyError("kaolin (rasterises on the GPU)", hint=_HOW) from None
        self._kaolin = kaolin
        self._tracer = _KaolinTracer(mesh, config, kaolin.render.mesh.rasterize, torch.device(device))

    @property
    def name(self) -> str:
        return f"kaolin {self._kaolin.__version__}, {super().name}"


class _KaolinTracer(Tracer):
    def __init__(self, mesh: Mesh, config: RenderConfig, rasterize: Any, device: torch.device) -> None:
        super().__init__(mesh, config)
        self._rasterize, self._device = rasterize, device
        self._corners = torch.from_numpy(mesh.triangles).to(device)  # [F, 3, 3]
        self._sample_faces: torch.Tensor | None = None

    def render(self, camera: Camera, out: Frames, view: int) -> None:
        self._sample_faces = self._rasterize_samples(camera)
        super().render(camera, out, view)

    def first_hits(self, tile: Tile, start: np.ndarray) -> Hits:
        if self._sample_faces is None:
            return super().first_hits(tile, start)
        n = self.config.supersample
        block = self._sample_faces[
            tile.y0 * n : (tile.y0 + tile.rows) * n, tile.x0 * n : (tile.x0 + tile.columns) * n
        ]
        faces = block.reshape(tile.rows, n, tile.columns, n).permute(0, 2, 1, 3).reshape(-1)
        directions = torch.from_numpy(tile.directions).to(self._device)
        eye = torch.from_numpy(tile.camera.eye.astype(np.float32)).to(self._device)
        u, v, t = _meet(self._corners[faces.clamp(min=0)], eye, directions)
        faces = torch.where(t > 0, faces, -1)
        return Hits(faces.to(torch.int32).cpu().numpy(), *(x.cpu().numpy() for x in (u, v, t)))

    def _rasterize_samples(self, camera: Camera) -> torch.Tensor | None:
        """Nearest face at every sample: int64 [H n, W n], -1 for none; None where Kaolin cannot be used."""
        height, width = (size * self.config.supersample for size in (camera.height, camera.width))
        rotation = torch.from_numpy(camera.rotation.astype(np.float32)).to(self._device)
        eye = torch.from_numpy(camera.eye.astype(np.float32)).to(self._device)
        seen = (self._corners - eye) @ rotation.T
        depth = seen[..., 2]
        if float(depth.min()) < _NEAR:
            return None
        x = (seen[..., 0] / depth * camera.K[0, 0] + camera.K[0, 2]) * (2 / camera.width) - 1
        y = 1 - (seen[..., 1] / depth * camera.K[1, 1] + camera.K[1, 2]) * (2 / camera.height)
        no_features = torch.zeros((1, len(seen), 3, 1), device=self._device)
        _, faces = self._rasterize(
            height, width, (1 / depth)[None], torch.stack([x, y], -1)[None], no_features
        )
        return torch.as_tensor(faces)[0]


def _meet(
    corners: torch.Tensor, eye: torch.Tensor, directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(u, v, t), [n] each, where rays [n, 3] from ``eye`` meet triangles [n, 3, 3]; kept inside them."""
    edge_u, edge_v = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    offset = eye - corners[:, 0]
    across = torch.linalg.cross(directions, edge_v)
    determinant = (edge_u * across).sum(1)
    inverse = 1 / torch.where(determinant.abs() > 1e-20, determinant, 1e-20)
    u = ((offset * across).sum(1) * inverse).clamp(0, 1)
    other = torch.linalg.cross(offset, edge_u)
    v = torch.minimum(((directions * other).sum(1) * inverse).clamp(min=0), 1 - u)
    return u, v, (edge_v * other).sum(1) * inverse
