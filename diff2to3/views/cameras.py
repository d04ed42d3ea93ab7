"""Cameras around the object: where training and conditioning views are taken from. OpenCV axes, pixels.

The published sets (paper section 4.1, from TRELLIS): 150 reconstruction views on a sphere of radius 2 with a
40 degree field of view, and 24 conditioning views whose field of view varies while the object's bounding
sphere just fills it. Directions are a Hammersley sequence with a random offset an asset, denser above the
horizon than below.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Radius of the sphere around the unit box in which every asset lies.
BOUNDING_RADIUS = math.sqrt(3) / 2


@dataclass(frozen=True)
class CameraConfig:
    """A set of cameras that look at the origin.

    kind             "sphere": one radius and field of view, directions all around;
                     "fitted": directions all around, the field of view varies and the radius follows, so
                     that the bounding sphere just fits (1/radius² is uniform, as published);
                     "orbit": equal steps of azimuth at one elevation (a turntable)
    num_views        V
    radius           distance to the origin ("sphere", "orbit")
    fov_degrees      across the shorter side of the image ("sphere", "orbit")
    fov_range        (least, greatest) degrees ("fitted")
    elevation_range  degrees above the horizon between which directions lie ("sphere", "fitted")
    lower_fraction   share of the views below the horizon, where elevation_range allows both
    elevation        degrees above the horizon ("orbit")
    """

    kind: str = "sphere"
    num_views: int = 150
    radius: float = 2.0
    fov_degrees: float = 40.0
    fov_range: tuple[float, float] = (10.0, 70.0)
    elevation_range: tuple[float, float] = (-90.0, 90.0)
    lower_fraction: float = 0.25
    elevation: float = 20.0

    def __post_init__(self) -> None:
        if self.kind not in ("sphere", "fitted", "orbit"):
            raise ValueError(f"kind: expected sphere, fitted or orbit, got {self.kind!r}")
        if self.num_views < 1:
            raise ValueError(f"num_views: expected at least 1, got {self.num_views}")
        if self.radius <= 0:
            raise ValueError(f"radius: expected a positive number, got {self.radius}")
        for name, (low, high), bound in (
            ("fov_range", self.fov_range, (0, 180)),
            ("fov_degrees", (self.fov_degrees, self.fov_degrees), (0, 180)),
        ):
            if not bound[0] < low <= high < bound[1]:
                raise ValueError(f"{name}: expected degrees in (0, 180) in order, got {getattr(self, name)}")
        low, high = self.elevation_range
        if not -90 <= low <= high <= 90:
            raise ValueError(f"elevation_range: expected degrees in [-90, 90] in order, got ({low}, {high})")
        if not 0 <= self.lower_fraction <= 1:
            raise ValueError(f"lower_fraction: expected a number in [0, 1], got {self.lower_fraction}")


#: The paper's two sets, by name.
CAMERA_SETS = {
    "reconstruction": CameraConfig("sphere", num_views=150),
    "conditioning": CameraConfig("fitted", num_views=24),
}


def generator_for(seed: int, *names: str) -> np.random.Generator:
    """A generator set by ``seed`` and ``names`` alone: the same asset gets the same cameras anywhere."""
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, "<u4").tolist()])


def sample_cameras(
    config: CameraConfig, width: int, height: int, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """(viewmats [V, 4, 4], Ks [V, 3, 3]), float32, for images of ``width`` x ``height`` pixels."""
    directions, radii, fovs = _sample(config, generator)
    viewmats = look_at(directions * radii[:, None])
    return viewmats, intrinsics(fovs, width, height)


def _sample(
    config: CameraConfig, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit directions [V, 3], radii [V] and fields of view in radians [V]."""
    count = config.num_views
    radii = np.full(count, config.radius)
    fovs = np.full(count, math.radians(config.fov_degrees))
    offset = generator.random(2)
    if config.kind == "orbit":
        azimuth = 2 * np.pi * np.arange(count) / count
        return _spherical(azimuth, np.full(count, math.sin(math.radians(config.elevation)))), radii, fovs
    u = (np.arange(count) + offset[0]) / count
    azimuth = 2 * np.pi * (_radical_inverse(count) + offset[1])
    directions = _spherical(azimuth, _sine_of_elevation(u, config))
    if config.kind == "fitted":
        # fov = 2 asin(r_object / radius), so 1/radius² is sin²(fov/2) up to a factor.
        low, high = (math.sin(math.radians(fov) / 2) ** 2 for fov in config.fov_range)
        sines = np.sqrt(generator.uniform(low, high, count))
        radii, fovs = BOUNDING_RADIUS / sines, 2 * np.arcsin(sines)
    return directions, radii, fovs


def _sine_of_elevation(u: np.ndarray, config: CameraConfig) -> np.ndarray:
    """u in [0, 1) -> sine of the elevation, uniform in area below and above the horizon."""
    low, high = (math.sin(math.radians(angle)) for angle in config.elevation_range)
    lower = config.lower_fraction if low < 0 < high else 0.0
    if lower == 0:
        return low + (high - low) * u
    return np.where(u < lower, low * (1 - u / lower), high * (u - lower) / max(1 - lower, 1e-12))


def _radical_inverse(count: int) -> np.ndarray:
    """Base-2 radical inverse (van der Corput) of 0 .. count-1."""
    index, value, digit = np.arange(count), np.zeros(count), 0.5
    while index.any():
        value += digit * (index % 2)
        index, digit = index // 2, digit / 2
    return value


def _spherical(azimuth: np.ndarray, sine: np.ndarray) -> np.ndarray:
    cosine = np.sqrt(np.maximum(1 - sine**2, 0))
    return np.stack([cosine * np.cos(azimuth), cosine * np.sin(azimuth), sine], 1)


def look_at(eyes: np.ndarray | Tensor, target: tuple[float, float, float] = (0, 0, 0)) -> Tensor:
    """World-to-camera matrices [V, 4, 4], float32, of cameras at ``eyes`` [V, 3] with +z of the world up.

    Straight above or below, where up is undefined, +y of the world points up in the image.
    """
    eyes = np.asarray(eyes, np.float64).reshape(-1, 3)
    forward = np.asarray(target, np.float64) - eyes
    distance = np.linalg.norm(forward, axis=1, keepdims=True)
    if not (distance > 0).all():
        raise ValueError("eyes: a camera lies on its target")
    forward /= distance
    right = np.cross(forward, [0.0, 0.0, 1.0])
    at_pole = np.linalg.norm(right, axis=1) < 1e-6
    right[at_pole] = np.cross(forward[at_pole], [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    down = np.cross(forward, right)
    viewmats = np.zeros((len(eyes), 4, 4))
    viewmats[:, :3, :3] = np.stack([right, down, forward], 1)
    viewmats[:, :3, 3] = -np.einsum("vij,vj->vi", viewmats[:, :3, :3], eyes)
    viewmats[:, 3, 3] = 1
    return torch.from_numpy(viewmats.astype(np.float32))


def intrinsics(fovs: np.ndarray | Tensor | float, width: int, height: int) -> Tensor:
    """Ks [V, 3, 3], float32, for fields of view in radians [V] across the shorter side; centred."""
    fovs = np.atleast_1d(np.asarray(fovs, np.float64))
    Ks = np.zeros((len(fovs), 3, 3))
    Ks[:, 0, 0] = Ks[:, 1, 1] = min(width, height) / 2 / np.tan(fovs / 2)
    Ks[:, 0, 2], Ks[:, 1, 2], Ks[:, 2, 2] = width / 2, height / 2, 1
    return torch.from_numpy(Ks.astype(np.float32))
