"""OBJ, PLY and STL through trimesh, after checks of size that trimesh does not make."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from diff2to3.assets.images import TextureBudget
from diff2to3.assets.limits import Limits
from diff2to3.assets.parts import Part
from diff2to3.assets.source import Resolver
from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.types import Material, Texture

#: What Blender gives a surface that has no material, linear.
_NO_MATERIAL = (0.8, 0.8, 0.8, 1.0)


def read_other(data: bytes, kind: str, resolve: Resolver, limits: Limits) -> tuple[list[Part], list[str]]:
    """Parts in file coordinates and notes. ``kind`` is obj, ply or stl.

    MTL colours are taken as linear, as Blender's importer does; PLY colours are sRGB-encoded bytes.
    """
    try:
        import trimesh
    except ImportError:
        raise MissingDependencyError(f"trimesh (reads .{kind} files)", "data") from None
    limits.check("triangles", _CLAIMED_FACES[kind](data), "max_faces")
    budget = TextureBudget(limits)
    files = _MaterialFiles(resolve)
    scene = trimesh.load_scene(
        io.BytesIO(data),
        file_type=kind,
        resolver=files if kind == "obj" else None,
        process=False,
        maintain_order=True,
    )
    files.raise_if_lost()
    meshes = [g for g in scene.geometry.values() if isinstance(g, trimesh.Trimesh) and len(g.faces)]
    if not meshes:
        what = "a point cloud or wireframe, not a surface" if scene.geometry else "an empty file"
        raise InputError(f"no triangles: {what}")
    limits.check("triangles", sum(len(m.faces) for m in meshes), "max_faces")
    has_normals = _HAS_NORMALS[kind](data)
    return [_to_part(mesh, has_normals, budget) for mesh in meshes], files.notes + budget.notes


class _MaterialFiles(Mapping[str, bytes]):
    """The files beside an OBJ, as trimesh asks for them; every read goes through the safe resolver.

    trimesh goes on without what it does not find. A missing texture would make an asset of the wrong colour,
    so it is remembered here and raised afterwards; a missing material file is a note (many exporters name one
    that they never wrote).
    """

    def __init__(self, resolve: Resolver) -> None:
        self._resolve = resolve
        self._errors: list[InputError] = []
        self.notes: list[str] = []

    def get(self, name: str, default: Any = None) -> bytes:
        try:
            return self._resolve(name.strip())
        except InputError as error:
            if name.strip().lower().endswith(".mtl"):
                self.notes.append(f"drawn grey: {error}")
            else:
                self._errors.append(error)
            raise KeyError(name) from error

    def __getitem__(self, name: str) -> bytes:
        return self.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def raise_if_lost(self) -> None:
        if self._errors:
            raise self._errors[0]


def _to_part(mesh: Any, has_normals: bool, budget: TextureBudget) -> Part:
    visual, uvs, colors = mesh.visual, None, None
    material = Material(base_color_factor=_NO_MATERIAL, double_sided=True)
    positions, faces, normals = mesh.vertices, mesh.faces, None
    if visual.kind == "texture" and visual.uv is not None:
        uvs = np.asarray(visual.uv, np.float64).astype(np.float32)
        uvs = np.stack([uvs[:, 0], 1 - uvs[:, 1]], 1)  # trimesh's v points up
    if visual.kind == "texture":
        material = _material(visual.material, budget)
    elif visual.kind == "vertex":
        material = Material(double_sided=True)
        colors = _decode_srgb(np.asarray(visual.vertex_colors))
    elif visual.kind == "face":
        material = Material(double_sided=True)
        colors = np.repeat(_decode_srgb(np.asarray(visual.face_colors)), 3, axis=0)
        positions, faces = mesh.vertices[mesh.faces].reshape(-1, 3), np.arange(3 * len(faces)).reshape(-1, 3)
    if has_normals and len(mesh.vertex_normals) == len(positions):
        normals = np.asarray(mesh.vertex_normals, np.float64)
    return Part(np.asarray(positions, np.float64), np.asarray(faces), material, normals, uvs, colors)


def _material(material: Any, budget: TextureBudget) -> Material:
    name = str(getattr(material, "name", "") or "")
    image = getattr(material, "image", None)
    if image is not None:
        pixels = budget.to_pixels(image, name)
        return Material(name=name, base_color_texture=Texture(pixels), double_sided=True)
    options = getattr(material, "kwargs", {})
    if not {"kd", "diffuse"} & {key.lower() for key in options}:
        return Material(name=name, base_color_factor=_NO_MATERIAL, double_sided=True)
    r, g, b = (float(x) / 255 for x in np.asarray(material.diffuse, np.float64)[:3])
    alpha = float(options["d"][0]) if "d" in options else 1 - float(options.get("Tr", ["0"])[0])
    mode = "BLEND" if alpha < 1 else "OPAQUE"
    return Material(name=name, base_color_factor=(r, g, b, alpha), alpha_mode=mode, double_sided=True)


def _decode_srgb(colors: np.ndarray) -> np.ndarray:
    """uint8 RGBA [P, 4] -> linear float32 [P, 4]."""
    encoded = colors[:, :3].astype(np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.concatenate([linear, colors[:, 3:4] / 255], 1).astype(np.float32)


def _claimed_obj_faces(data: bytes) -> int:
    return sum(1 for _ in re.finditer(rb"(?m)^[ \t]*f[ \t]", data))


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


def _obj_has_normals(data: bytes) -> bool:
    return re.search(rb"(?m)^[ \t]*vn[ \t]", data) is not None


def _ply_has_normals(data: bytes) -> bool:
    return re.search(rb"(?m)^property\s+\w+\s+nx\s*$", data[: data.find(b"end_header")]) is not None


_HAS_NORMALS = {"obj": _obj_has_normals, "ply": _ply_has_normals, "stl": _never}
_CLAIMED_FACES = {"obj": _claimed_obj_faces, "ply": _claimed_ply_faces, "stl": _claimed_stl_faces}
