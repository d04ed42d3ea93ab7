"""The photo frame: coordinates in which a photo's camera is known but for its elevation and its perspective.

z points up, and the camera looks along +y, so that +x is the right of the picture. The ray through the centre of the
square crop passes through the origin, and at the origin's depth the crop is one unit wide: the object's silhouette,
whose longer side is :data:`SILHOUETTE` of the crop's, then spans that share of the unit cube. What a photo does not say
is how far above the horizon the camera stood (``elevation``) and how strong the perspective is (``focal``: the focal
length over the side of the crop). At the origin's depth one crop side is one unit, so the camera's distance from the
origin equals ``focal``.

Where on that ray the origin lies is fixed by what the photo shows: the mean depth of the surface that it sees is
:data:`SURFACE_DEPTH` in front of the origin. (The middle of the object would be ambiguous, for a photo does not say
how deep an object is. Over rendered photographs the visible surface's mean lies 0.13 in front of the middle, with a
deviation of 0.10, three voxels of 32³.)

             z            camera                    A voxel of the unit cube projects into the crop through
             │  y          ╲  distance = focal       :meth:`PhotoCamera.viewmat` and :meth:`PhotoCamera.K`.
             │ ╱            ╲ ) elevation
             └──── x      ───○── the origin, in the middle of the unit cube
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diff2to3.views.cameras import look_at

#: Longer side of the object's silhouette over the side of the crop.
SILHOUETTE = 0.85
#: Mean depth of the visible surface in front of the origin, in units of the frame.
SURFACE_DEPTH = 0.15
#: Aiming the camera at the middle of the silhouette moves the silhouette a little; this many rounds settle it to 1e-4.
_ROUNDS = 12


@dataclass(frozen=True)
class PhotoCamera:
    """What the photo frame leaves open of a camera.

    elevation  degrees above the horizon; positive looks down on the object
    focal      focal length over the side of the crop; also the distance from the origin, in units of the frame
    """

    elevation: float
    focal: float

    def __post_init__(self) -> None:
        if not -90 < self.elevation < 90:
            raise ValueError(f"elevation: expected degrees between -90 and 90, got {self.elevation}")
        if not self.focal > 0.5:
            raise ValueError(f"focal: expected more than half a crop side, got {self.focal}")

    @property
    def eye(self) -> tuple[float, float, float]:
        """Where the camera stands, in the photo frame."""
        angle = math.radians(self.elevation)
        return (0.0, -self.focal * math.cos(angle), self.focal * math.sin(angle))

    @property
    def viewmat(self) -> Tensor:
        """World to camera [4, 4], float32."""
        return look_at(np.array([self.eye]))[0]

    def K(self, size: int) -> Tensor:
        """Intrinsics [3, 3] in pixels of a crop of ``size`` pixels a side."""
        focal = self.focal * size
        return torch.tensor([[focal, 0.0, size / 2], [0.0, focal, size / 2], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Photograph:
    """One asset as one camera sees it.

    camera     in the photo frame
    transform  float64 [4, 4]: object frame -> photo frame, a rotation about z, a scale and a shift
    viewmat    float32 [4, 4]: the same camera in the object frame, whose crop is the whole picture
    """

    camera: PhotoCamera
    transform: np.ndarray
    viewmat: Tensor

    @property
    def scale(self) -> float:
        """Units of the photo frame in a unit of the object frame."""
        return float(np.linalg.norm(self.transform[:3, 0]))

    def placed(self, depths: np.ndarray) -> Photograph:
        """With the origin :data:`SURFACE_DEPTH` behind the mean of the depths that the camera sees: an array of them in
        the object frame's units, 0 where nothing is seen. The picture stays: the frame grows about the camera.

        Raises ValueError where nothing is seen.
        """
        seen = depths[depths > 0]
        if not len(seen):
            raise ValueError("depths: nothing is seen")
        focal = self.camera.focal
        factor = (focal - SURFACE_DEPTH) / (float(seen.astype(np.float64).mean()) * self.scale)
        transform = self.transform.copy()
        eye = np.array(self.camera.eye)
        transform[:3] *= factor
        transform[:3, 3] += (1 - factor) * eye
        return replace(self, transform=transform)


def photograph(vertices: np.ndarray, azimuth: float, elevation: float, focal: float) -> Photograph:
    """The camera that sees ``vertices`` [P, 3] from a direction, aimed so that their silhouette fills the crop.

    The origin is in the middle of the object until :meth:`Photograph.placed` puts it where what is seen says.

    Args:
        azimuth: degrees about z of the direction from the object to the camera, 0 along +x.
        elevation: degrees above the horizon of that direction; the photograph's own differs by the little that the
            camera turns to have the silhouette in its middle.
        focal: focal length over the side of the crop, above 0.5.

    Raises:
        ValueError: no vertices, or a focal length so short that the camera would stand inside the object.
    """
    points = np.unique(np.asarray(vertices, np.float64).reshape(-1, 3), axis=0)
    if not len(points):
        raise ValueError("vertices: expected at least one")
    low, high = points.min(0), points.max(0)
    middle, radius = (low + high) / 2, max(float(np.linalg.norm(high - low)) / 2, 1e-6)
    a, e = math.radians(azimuth), math.radians(elevation)
    direction = np.array([math.cos(a) * math.cos(e), math.sin(a) * math.cos(e), math.sin(e)])
    distance, target = max(2 * focal, 1.5) * radius, middle
    for _ in range(_ROUNDS):
        eye = middle + direction * distance
        viewmat = look_at(eye[None], (float(target[0]), float(target[1]), float(target[2])))[0]
        rotation = viewmat[:3, :3].numpy().astype(np.float64)
        seen = (points - eye) @ rotation.T
        if float(seen[:, 2].min()) < 0.05 * radius:  # too near: step back and look again
            distance *= 1.5
            continue
        plane = seen[:, :2] / seen[:, 2:]
        centre = (plane.min(0) + plane.max(0)) / 2
        side = float((plane.max(0) - plane.min(0)).max()) / SILHOUETTE
        along = np.array([*centre, 1.0]) @ rotation
        target = eye + along * max(float((middle - eye) @ along), 1e-6) / float(along @ along)
        distance *= min(max(side * focal, 0.5), 2.0)
    forward = rotation[2]
    depth = float((middle - eye) @ forward)
    if float(seen[:, 2].min()) < 0.05 * radius:
        raise ValueError(f"focal: {focal} crop sides put the camera inside the object")
    scale = focal / depth
    origin = eye + forward * depth
    yaw = math.pi / 2 - math.atan2(forward[1], forward[0])
    transform = np.eye(4)
    transform[:2, :2] = [[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]]
    transform[:3, :3] *= scale
    transform[:3, 3] = -transform[:3, :3] @ origin
    return Photograph(PhotoCamera(math.degrees(math.asin(-forward[2])), float(focal)), transform, viewmat)


def moved_viewmats(viewmats: Tensor, transform: np.ndarray) -> tuple[Tensor, float]:
    """Cameras of a frame [V, 4, 4] in the frame that ``transform`` [4, 4] (a similarity) leads to, and the factor by
    which depths in them grow."""
    scale = float(np.linalg.norm(transform[:3, 0]))
    moved = viewmats.double() @ torch.from_numpy(np.linalg.inv(transform))
    moved[:, :3] *= scale
    return moved.to(viewmats.dtype), scale


def transformed(points: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Points [..., 3] through a matrix [4, 4]; keeps the dtype."""
    moved = points.astype(np.float64) @ transform[:3, :3].T + transform[:3, 3]
    return np.asarray(moved, points.dtype)
