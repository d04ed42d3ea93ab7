"""How much light reaches a point: a soft dome and a key light, fixed to the object, with traced shadows."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import numpy as np

from diff2to3.views.config import LightingConfig
from diff2to3.views.dome import DomeCache
from diff2to3.views.raycast import SURFACE_OFFSET, RayScene
from diff2to3.views.surface import Surface


class SurfacePoints(NamedTuple):
    """n points of faces, seen from one side. Normals are unit and on that side."""

    faces: np.ndarray  # int [n]
    sides: np.ndarray  # int [n]: 0 the side from which the face winds counter-clockwise, 1 the other
    u: np.ndarray  # float32 [n], barycentric
    v: np.ndarray  # float32 [n]
    points: np.ndarray  # float32 [n, 3]
    flat: np.ndarray  # float32 [n, 3], geometric normals
    shading: np.ndarray  # float32 [n, 3], normals as the file smooths them


_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


class Lights:
    """White light of one configuration on one mesh. :meth:`irradiance` is what it does to a white surface."""

    def __init__(self, config: LightingConfig, surface: Surface, scene: RayScene, max_layers: int) -> None:
        self.config = config
        self._shadows = _Shadows(surface, scene, max_layers) if config.shadows else None
        # Radiance rises from `ground` below to 1 above: L(w) = base + slope w_z.
        self._base, self._slope = (1 + config.dome_ground) / 2, (1 - config.dome_ground) / 2
        self._scale = config.dome_intensity / (self._base + 2 / 3 * self._slope)
        self._dome = _fibonacci_sphere(config.dome_samples)
        self._seen = DomeCache(surface, 1 / config.dome_resolution, self._dome_visibility)
        self._key = _cone(np.array(config.key_direction), math.radians(config.key_angle), config.key_samples)

    def relit(self, config: LightingConfig) -> Lights:
        """Other light on the same mesh. What is costly, the dome's traced shadows, is shared where neither its
        resolution, its directions nor its gradient differ.
        """
        old = self.config
        if (config.mode, config.shadows, config.dome_ground, config.dome_samples, config.dome_resolution) != (
            old.mode, old.shadows, old.dome_ground, old.dome_samples, old.dome_resolution,
        ):  # fmt: skip
            raise ValueError("config: relit changes the key light and the intensities only")
        lights = copy.copy(self)
        lights.config = config
        lights._scale = config.dome_intensity / (self._base + 2 / 3 * self._slope)
        lights._key = _cone(
            np.array(config.key_direction), math.radians(config.key_angle), config.key_samples
        )
        return lights

    def irradiance(self, at: SurfacePoints) -> np.ndarray:
        """Light on a white surface, relative to what it reflects at most: float32 [n]."""
        dome = self._dome_light(at.shading)
        if self._shadows is not None and self.config.dome_intensity > 0:
            dome *= self._seen.read(at.faces, at.sides, at.u, at.v)
        return dome + self._key_light(at.points, at.flat, at.shading)

    def _dome_light(self, shading: np.ndarray) -> np.ndarray:
        """The unshadowed integral of L(w) (n.w)+ over the sphere, over pi, in closed form."""
        level, slope = self._scale * self._base, self._scale * self._slope * 2 / 3
        return np.float32(level) + np.float32(slope) * shading[:, 2]

    def _dome_visibility(self, points: np.ndarray, flat: np.ndarray, shading: np.ndarray) -> np.ndarray:
        """Share of the dome's light that is not blocked: float32 [n].

        A ratio of sums over fixed directions, so that a surface with a free view gets exactly 1, however few
        directions there are. Directions below the flat surface, which a smoothed normal may face, do not
        count.
        """
        assert self._shadows is not None
        start = points + np.float32(SURFACE_OFFSET) * flat
        seen, total = np.zeros(len(start), np.float32), np.full(len(start), 1e-6, np.float32)
        for direction in self._dome:
            weight = _dot(shading, direction) * np.float32(self._base + self._slope * direction[2])
            rows = np.flatnonzero((weight > 0) & (_dot(flat, direction) > 0))
            weight = weight[rows]
            total[rows] += weight
            seen[rows] += weight * self._shadows.transmitted(start[rows], direction)
        return np.where(total > 1e-5, seen / total, np.float32(1))

    def _key_light(self, points: np.ndarray, flat: np.ndarray, shading: np.ndarray) -> np.ndarray:
        light = np.zeros(len(points), np.float32)
        if self.config.key_intensity <= 0:
            return light
        start = points + np.float32(SURFACE_OFFSET) * flat
        for direction in self._key:
            cosine = _dot(shading, direction)
            rows = np.flatnonzero((cosine > 0) & (_dot(flat, direction) > 0))
            lit = cosine[rows]
            if self._shadows is not None:
                lit = lit * self._shadows.transmitted(start[rows], direction)
            light[rows] += lit
        return light * np.float32(self.config.key_intensity / len(self._key))


class _Shadows:
    """What blocks light: opaque faces all of it, masked and blended ones by their opacity."""

    def __init__(self, surface: Surface, scene: RayScene, max_layers: int) -> None:
        """``scene`` holds all faces; the opaque ones get one of their own where they are not all."""
        mesh, self._surface, self._max_layers = surface.mesh, surface, max_layers
        self._opaque = scene
        if not surface.opaque.all():
            self._opaque = RayScene(mesh.vertices, mesh.faces[surface.opaque])
        self._sheer_faces = np.flatnonzero(~surface.opaque)
        self._sheer = RayScene(mesh.vertices, mesh.faces[self._sheer_faces])

    def transmitted(self, start: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Share of the light from ``direction`` [3] that arrives at ``start`` [n, 3]: float32 [n]."""
        light = 1 - self._opaque.blocked(start, direction).astype(np.float32)
        rows = np.flatnonzero(light) if len(self._sheer_faces) else np.zeros(0, np.int64)
        points = start[rows]
        for _ in range(self._max_layers):
            if not len(rows):
                break
            hits = self._sheer.nearest(points, np.broadcast_to(direction, points.shape).astype(np.float32))
            hit = hits.faces >= 0
            rows, points, t = rows[hit], points[hit], hits.t[hit]
            faces = self._sheer_faces[hits.faces[hit]]
            light[rows] *= 1 - self._surface.opacities(faces, hits.u[hit], hits.v[hit])
            points = points + (t[:, None] + np.float32(SURFACE_OFFSET)) * direction
            alive = light[rows] > 1 / 512
            rows, points = rows[alive], points[alive]
        return light


def _dot(vectors: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """[n, 3] . [3], written out: a matrix product may round differently from machine to machine."""
    return vectors[:, 0] * direction[0] + vectors[:, 1] * direction[1] + vectors[:, 2] * direction[2]


def _fibonacci_sphere(count: int) -> np.ndarray:
    """Evenly spread unit directions, float32 [count, 3]."""
    index = np.arange(count)
    z = 1 - (2 * index + 1) / count
    radius, angle = np.sqrt(1 - z * z), _GOLDEN_ANGLE * index
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], 1).astype(np.float32)


def _cone(axis: np.ndarray, angle: float, count: int) -> np.ndarray:
    """Evenly spread unit directions within ``angle`` of ``axis``, float32 [count, 3]."""
    axis = axis / np.linalg.norm(axis)
    side = np.cross(axis, [1.0, 0, 0] if abs(axis[0]) < 0.9 else [0, 1.0, 0])
    side /= np.linalg.norm(side)
    other = np.cross(axis, side)
    if count == 1:
        return axis[None].astype(np.float32)
    index = np.arange(count)
    radius = math.tan(angle) * np.sqrt((index + 0.5) / count)
    turn = _GOLDEN_ANGLE * index
    spread = radius * np.cos(turn), radius * np.sin(turn)
    directions = axis + spread[0][:, None] * side + spread[1][:, None] * other
    return np.asarray((directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32))
