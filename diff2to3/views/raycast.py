"""Rays against triangles on the CPU: Embree through the ``embreex`` package, called without detours."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from diff2to3.errors import MissingDependencyError

#: How far a ray that continues or starts on a surface is moved off it, in object units.
SURFACE_OFFSET = 1e-4


class Hits(NamedTuple):
    """Nearest hits of n rays. Where ``faces`` is -1 the ray hits nothing and the rest is undefined."""

    faces: np.ndarray  # int32 [n]
    u: np.ndarray  # float32 [n]; the point is (1 - u - v) a + u b + v c of the face's corners
    v: np.ndarray  # float32 [n]
    t: np.ndarray  # float32 [n], in lengths of the direction


class RayScene:
    """Triangles to shoot at. Vertices float32 [P, 3], faces int32 [F, 3]; F may be 0.

    Embree runs each call on the calling thread, so results do not depend on any number of threads.
    """

    def __init__(self, vertices: np.ndarray, faces: np.ndarray) -> None:
        self.num_faces = len(faces)
        self._scene: Any = None
        if not self.num_faces:
            return
        try:
            from embreex.mesh_construction import TriangleMesh
            from embreex.rtcore_scene import EmbreeScene
        except ImportError:
            raise MissingDependencyError("embreex (casts rays)", "data") from None
        # Robust traversal: without it a few rays in a million slip between the triangles of a closed surface.
        self._scene = EmbreeScene(robust=True)
        TriangleMesh(
            self._scene,
            np.ascontiguousarray(vertices, np.float32),
            np.ascontiguousarray(faces, np.int32),
        )

    def nearest(self, origins: np.ndarray, directions: np.ndarray) -> Hits:
        """First hits of rays, float32 [n, 3] each."""
        n = len(origins)
        if self._scene is None or n == 0:
            nothing = np.zeros(n, np.float32)
            return Hits(np.full(n, -1, np.int32), nothing, nothing, nothing)
        found = self._scene.run(origins, directions, output=True)
        return Hits(found["primID"], found["u"], found["v"], found["tfar"])

    def blocked(self, origins: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Whether anything lies in ``direction`` [3] from ``origins`` [n, 3]: bool [n]."""
        if self._scene is None or len(origins) == 0:
            return np.zeros(len(origins), bool)
        shared = np.ascontiguousarray(direction, np.float32).reshape(1, 3)
        return np.asarray(self._scene.run(origins, shared, query="OCCLUDED") != -1)
