"""PLY and STL through trimesh, after checks of size that trimesh does not make."""

from __future__ import annotations

import io
import re
import struct
from typing import Any

import numpy as np

from diff2to3.assets.limits import Limits
from diff2to3.assets.parts import NO_MATERIAL, Part, decode_srgb
from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.types import Material


def read_other(data: bytes, kind: str, limits: Limits) -> tuple[list[Part], list[str]]:
    """Parts in file coordinates and notes. ``kind`` is ply or stl; PLY colours are sRGB-encoded bytes."""
    try:
        import trimesh
    except ImportError:
        raise MissingDependencyError(f"trimesh (reads .{kind} files)", "data") from None
    limits.check("triangles", _CLAIMED_FACES[kind](data), "max_faces")
    scene = trimesh.load_scene(io.BytesIO(data), file_type=kind, process=False)
    meshes = [g for g in scene.geometry.values() if isinstance(g, trimesh.Trimesh) and len(g.faces)]
    if not meshes:
        what = "a point cloud or wireframe, not a surface" if scene.geometry else "an empty file"
        raise InputError(f"no triangles: {what}")
    limits.check("triangles", sum(len(m.faces) for m in meshes), "max_faces")
    has_normals = _HAS_NORMALS[kind](data)
    return [_to_part(mesh, has_normals) for mesh in meshes], []


def _to_part(mesh: Any, has_normals: bool) -> Part:
    visual, colors = mesh.visual, None
    positions, faces, normals = mesh.vertices, mesh.faces, None
    if visual.kind == "vertex":
        colors = _linear(visual.vertex_colors)
    elif visual.kind == "face":
        colors = np.repeat(_linear(visual.face_colors), 3, axis=0)
        positions, faces = mesh.vertices[mesh.faces].reshape(-1, 3), np.arange(3 * len(faces)).reshape(-1, 3)
    elif visual.kind == "texture":
        raise InputError("PLY files with textures are not read; convert to glTF or OBJ")
    if has_normals and len(mesh.vertex_normals) == len(positions):
        normals = np.asarray(mesh.vertex_normals, np.float64)
    material = Material(base_color_factor=NO_MATERIAL if colors is None else (1, 1, 1, 1), double_sided=True)
    return Part(np.asarray(positions, np.float64), np.asarray(faces), material, normals, colors=colors)


def _linear(colors: np.ndarray) -> np.ndarray:
    """uint8 RGBA [P, 4], sRGB-encoded -> linear float32 [P, 4]."""
    unit = np.asarray(colors).astype(np.float64) / 255
    return np.concatenate([decode_srgb(unit[:, :3]), unit[:, 3:4]], 1).astype(np.float32)


def _claimed_ply_faces(data: bytes) -> int:
    end = data.find(b"end_header", 0, 1 << 20)
    if data[:3] != b"ply" or end < 0:
        raise InputError("not a PLY file: no header")
    counts = dict(re.findall(rb"(?m)^element\s+(\w+)\s+(\d+)", data[:end]))
    if int(counts.get(b"face", 0)) == 0:
        raise InputError("no triangles: a point cloud, not a surface")
    # Vertices are allocated from the header too; more than three a face cannot all be used.
    return max(int(counts[b"face"]), int(counts.get(b"vertex", 0)) // 3)


def _claimed_stl_faces(data: bytes) -> int:
    if len(data) >= 84:
        (count,) = struct.unpack_from("<I", data, 80)
        if len(data) == 84 + 50 * count:
            return int(count)
    return data.count(b"endfacet")


def _never(data: bytes) -> bool:
    return False


def _ply_has_normals(data: bytes) -> bool:
    return re.search(rb"(?m)^property\s+\w+\s+nx\s*$", data[: data.find(b"end_header")]) is not None


_HAS_NORMALS = {"ply": _ply_has_normals, "stl": _never}
_CLAIMED_FACES = {"ply": _claimed_ply_faces, "stl": _claimed_stl_faces}
