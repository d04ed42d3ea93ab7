"""From parts in file coordinates to one :class:`Mesh` in the object frame. Every format ends here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diff2to3.errors import InputError
from diff2to3.types import Material, Mesh

#: glTF and OBJ are y up: (x, y, z) -> (x, -z, y).
Y_UP_TO_Z_UP = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])

#: What Blender gives a surface that has no material, linear RGBA.
NO_MATERIAL = (0.8, 0.8, 0.8, 1.0)


def decode_srgb(encoded: np.ndarray) -> np.ndarray:
    """sRGB-encoded values in [0, 1] -> linear (IEC 61966-2-1)."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear values in [0, 1] -> sRGB-encoded (IEC 61966-2-1)."""
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


@dataclass(frozen=True, eq=False)
class Part:
    """Triangles of one material in file coordinates; float64 positions [P, 3], integer faces [F, 3].

    normals [P, 3], uvs float32 [P, 2] (v down) and colors float32 [P, 4] (linear) may each be None; emissive_uvs
    float32 [P, 2] are those of the emissive texture where they differ.
    """

    positions: np.ndarray
    faces: np.ndarray
    material: Material
    normals: np.ndarray | None = None
    uvs: np.ndarray | None = None
    colors: np.ndarray | None = None
    emissive_uvs: np.ndarray | None = None


def assemble(parts: Sequence[Part], up: str, name: str, notes: Sequence[str] = ()) -> Mesh:
    """Merge, turn z up, centre the bounding box and scale its longest side to 1 (DESIGN section 2).

    Faces without area are dropped; normals of zero length mean flat shading. Raises InputError for
    coordinates that are not finite and for a mesh without area.
    """
    notes = list(notes)
    positions = np.concatenate([part.positions for part in parts]).astype(np.float64)
    offsets = np.cumsum([0, *(len(part.positions) for part in parts)])[:-1]
    faces = np.concatenate([part.faces + offset for part, offset in zip(parts, offsets, strict=True)])
    materials, rows = _unique_materials(parts)
    material_ids = np.repeat(rows, [len(part.faces) for part in parts])

    used = np.unique(faces)
    _check_finite(positions[used])
    # In float64 and relative to the box, so that geodata far from the origin is not rounded to nothing.
    low, high = positions[used].min(0), positions[used].max(0)
    extent = float((high - low).max())
    if not 0 < extent < np.inf:
        raise InputError("all vertices lie on one point, or too far apart to measure")
    rotation = Y_UP_TO_Z_UP if up == "y" else np.eye(3)
    vertices = ((positions - (low + high) / 2) / extent) @ rotation.T
    keep = _has_area(vertices, faces)
    if not keep.any():
        raise InputError("no triangle has an area")
    if not keep.all():
        notes.append(f"{int((~keep).sum())} triangles without area are dropped")
    used, inverse = np.unique(faces[keep], return_inverse=True)

    transform = np.eye(4)
    transform[:3, :3] = rotation / extent
    transform[:3, 3] = -(rotation @ ((low + high) / 2)) / extent
    return Mesh(
        vertices=vertices[used].astype(np.float32),
        faces=inverse.reshape(-1, 3).astype(np.int32),
        material_ids=material_ids[keep].astype(np.int32),
        materials=tuple(materials),
        normals=_merge_normals(parts, rotation, used),
        uvs=_merge([part.uvs for part in parts], parts, 2, 0.0, used),
        colors=_merge([part.colors for part in parts], parts, 4, 1.0, used),
        emissive_uvs=_merge_emissive_uvs(parts, used),
        transform=transform,
        name=name,
        notes=tuple(dict.fromkeys(notes)),
    )


def _unique_materials(parts: Sequence[Part]) -> tuple[list[Material], list[int]]:
    """Materials in order of first use, and each part's row among them."""
    materials: list[Material] = []
    by_identity: dict[int, int] = {}
    rows = []
    for part in parts:
        if id(part.material) not in by_identity:
            by_identity[id(part.material)] = len(materials)
            materials.append(part.material)
        rows.append(by_identity[id(part.material)])
    return materials, rows


def _check_finite(positions: np.ndarray) -> None:
    bad = int((~np.isfinite(positions)).any(1).sum())
    if bad:
        raise InputError(f"{bad} of {len(positions)} vertices are not finite numbers")


def _has_area(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Faces that survive rounding to float32: bool [F]."""
    corners = vertices.astype(np.float32).astype(np.float64)[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return np.asarray((normals**2).sum(1) > 0)


def _merge(
    arrays: Sequence[np.ndarray | None], parts: Sequence[Part], width: int, fill: float, used: np.ndarray
) -> np.ndarray | None:
    """Concatenate what the parts have; parts without get ``fill``. None when no part has any."""
    if all(array is None for array in arrays):
        return None
    whole = [
        np.full((len(part.positions), width), fill) if array is None else array
        for array, part in zip(arrays, parts, strict=True)
    ]
    merged = np.concatenate(whole)[used].astype(np.float32)
    return np.nan_to_num(merged, nan=fill, posinf=fill, neginf=fill)


def _merge_emissive_uvs(parts: Sequence[Part], used: np.ndarray) -> np.ndarray | None:
    if all(part.emissive_uvs is None for part in parts):
        return None
    own = [part.uvs if part.emissive_uvs is None else part.emissive_uvs for part in parts]
    return _merge(own, parts, 2, 0.0, used)


def _merge_normals(parts: Sequence[Part], rotation: np.ndarray, used: np.ndarray) -> np.ndarray | None:
    normals = _merge([part.normals for part in parts], parts, 3, 0.0, used)
    if normals is None:
        return None
    turned = normals.astype(np.float64) @ rotation.T
    length = np.linalg.norm(turned, axis=1, keepdims=True)
    return np.asarray(np.where(length > 1e-12, turned / np.maximum(length, 1e-12), 0).astype(np.float32))
