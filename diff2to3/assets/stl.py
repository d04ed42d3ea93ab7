"""STL through trimesh, after checks of size that trimesh does not make."""

from __future__ import annotations

import io
import struct

import numpy as np

from diff2to3.assets.limits import Limits
from diff2to3.assets.parts import NO_MATERIAL, Part
from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.files import utf8
from diff2to3.types import Material


def read_stl(data: bytes, limits: Limits) -> tuple[list[Part], list[str]]:
    """Parts in file coordinates, and notes."""
    try:
        import trimesh
    except ImportError:
        raise MissingDependencyError("trimesh (reads .stl files)", "data") from None
    if not _is_binary(data):
        data = utf8(data)
    limits.check("triangles", _claimed_faces(data), "max_faces")
    scene = trimesh.load_scene(io.BytesIO(data), file_type="stl", process=False)
    meshes = [g for g in scene.geometry.values() if isinstance(g, trimesh.Trimesh) and len(g.faces)]
    if not meshes:
        what = "a point cloud or wireframe, not a surface" if scene.geometry else "an empty file"
        raise InputError(f"no triangles: {what}")
    limits.check("triangles", sum(len(m.faces) for m in meshes), "max_faces")
    material = Material(base_color_factor=NO_MATERIAL, double_sided=True)
    return [Part(np.asarray(m.vertices, np.float64), np.asarray(m.faces), material) for m in meshes], []


def _is_binary(data: bytes) -> bool:
    return len(data) >= 84 and len(data) == 84 + 50 * int(struct.unpack_from("<I", data, 80)[0])


def _claimed_faces(data: bytes) -> int:
    if _is_binary(data):
        return int(struct.unpack_from("<I", data, 80)[0])
    return data.count(b"endfacet")
