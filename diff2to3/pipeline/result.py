"""One generated object, and what can be done with it: saved, rendered, made into a mesh."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diff2to3 import __version__, formats
from diff2to3.errors import InputError
from diff2to3.gaussians.render import EPS2D, render, to_uint8
from diff2to3.mesh import MeshSettings, TexturedMesh, to_mesh
from diff2to3.pipeline.photos import Photo
from diff2to3.pipeline.turntable import turntable
from diff2to3.types import Gaussians, SparseVoxels
from diff2to3.views.photo_frame import PhotoCamera

#: Degrees around z from +x of a camera that sees an object's front: it stands at -y.
FRONT = -90.0


@dataclass(frozen=True)
class Result:
    """One generated object.

    latents  as the decoder takes them
    coords   int32 [M, 3], sorted: the active voxels
    seconds  by stage; of the whole batch where several objects were generated at once
    photos   what the model saw; none for texts
    frame    what the object stands in: "object", its own frame, or "photo" (diff2to3.views.photo_frame), whose front,
             the side that the photo shows, faces -y. z is up in both
    camera   of the photo, in the photo frame; None in the object's
    """

    gaussians: Gaussians
    latents: SparseVoxels
    coords: Tensor
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)
    photos: tuple[Photo, ...] = ()
    frame: str = "object"
    camera: PhotoCamera | None = None

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write the Gaussians in the format that the path's ending names: .ply, .compressed.ply, .splat, .spz, .sog,
        .glb. A file that exists is replaced.

        Args:
            options: of :func:`diff2to3.formats.encode`: ``frame``, ``bake_filter``.

        Raises:
            InputError: no format has this ending, or the file cannot be written.
        """
        formats.write(path, self.gaussians, self.record(), **options)
        return Path(path)

    def render(
        self, camera: PhotoCamera | None = None, *, size: int = 512, background: float = 1.0
    ) -> Image.Image:
        """A picture from a camera of the photo frame.

        Args:
            camera: where it stands; by default the photo's own camera.
            size: pixels a side.
            background: grey level from 0 to 1.

        Raises:
            InputError: no camera is given, and the model does not work in the photo frame.
        """
        chosen = camera or self.camera
        if chosen is None:
            raise InputError("camera: this result does not know its photo's camera; give one")
        viewmats, Ks = chosen.viewmat[None], chosen.K(size)[None]
        device = self.gaussians.means.device
        with torch.no_grad():
            seen = render(
                self.gaussians, viewmats.to(device), Ks.to(device), size, size, background=background
            )
        return Image.fromarray(to_uint8(seen.colors[0]).cpu().numpy())

    def turntable(self, num_views: int = 8, size: int = 256) -> np.ndarray:
        """Frames uint8 [V, size, size, 3] of one turn around the object. The first shows the side that the photo
        shows."""
        return turntable(self.gaussians, num_views, size, azimuth=FRONT)

    def to_mesh(self, settings: MeshSettings | None = None) -> TexturedMesh:
        """A textured triangle mesh (:func:`diff2to3.mesh.to_mesh`); write it with ``diff2to3.mesh.write_mesh``."""
        return to_mesh(self.gaussians, settings)

    def record(self) -> dict[str, Any]:
        """What the files that hold this result say about it."""
        return {"generator": f"diff2to3 {__version__}", "seed": self.seed, "screen_filter": EPS2D}

    @property
    def notes(self) -> tuple[str, ...]:
        """What looks wrong with the photos: one line per problem."""
        return tuple(dict.fromkeys(note for photo in self.photos for note in photo.notes))
