"""Wavefront OBJ with MTL materials, in file coordinates.

Read here rather than by trimesh, which drops texture coordinates where faces with and without them mix,
rounds colours to bytes, and goes on without textures it does not find. Polygons become fans. Smoothing
groups, curves and every MTL statement but Kd, map_Kd, d, Tr and Ke are ignored. Kd is linear, as Blender's
importer takes it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from diff2to3.assets.images import TextureBudget
from diff2to3.assets.limits import Limits
from diff2to3.assets.parts import NO_MATERIAL, Part, decode_srgb
from diff2to3.assets.source import Resolver
from diff2to3.errors import InputError
from diff2to3.types import Material, Texture

#: How many arguments each option of a map statement takes (MTL specification, texture map options).
_MAP_OPTIONS = {
    "-blendu": 1, "-blendv": 1, "-bm": 1, "-boost": 1, "-cc": 1, "-clamp": 1, "-imfchan": 1, "-mm": 2,
    "-o": 3, "-s": 3, "-t": 3, "-texres": 1, "-type": 1,
}  # fmt: skip


@dataclass
class _Statements:
    """What an OBJ says, before anything is put together. Indices count from 0."""

    vertices: list[list[bytes]] = field(default_factory=list)
    uvs: list[list[bytes]] = field(default_factory=list)
    normals: list[list[bytes]] = field(default_factory=list)
    corners: dict[str, list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    libraries: list[str] = field(default_factory=list)
    num_triangles: int = 0
    num_other: int = 0


def read_obj(data: bytes, resolve: Resolver, limits: Limits) -> tuple[list[Part], list[str]]:
    """One part a material, and notes. InputError for what cannot be drawn; see :func:`load_mesh`."""
    said = _parse(data, limits)
    if said.num_triangles == 0:
        what = "a point cloud or wireframe, not a surface" if said.vertices else "an empty file"
        raise InputError(f"no triangles: {what}")
    budget, notes = TextureBudget(limits), []
    materials: dict[str, Material] = {}
    for library in said.libraries:
        try:
            text = resolve(library)
        except InputError as error:  # many exporters name a file that they never wrote
            notes.append(f"material file not found, drawn grey: {error}")
            continue
        materials |= _read_mtl(text, resolve, budget)
    vertices, colors = _vertex_array(said.vertices)
    uvs = _number_array(said.uvs, 2)
    normals = _number_array(said.normals, 3)
    parts = []
    for name, corners in said.corners.items():
        plain = NO_MATERIAL if colors is None else (1.0, 1.0, 1.0, 1.0)
        material = materials.get(name) or Material(name, plain, double_sided=True)
        parts.append(_part(np.array(corners, np.int64), vertices, colors, uvs, normals, material))
    return parts, notes + budget.notes


def _parse(data: bytes, limits: Limits) -> _Statements:
    said = _Statements()
    material = ""
    for line in data.replace(b"\\\r\n", b" ").replace(b"\\\n", b" ").splitlines():
        words = line.split()
        if not words:
            continue
        key = words[0]
        if key == b"v":
            said.vertices.append(words[1:])
        elif key == b"vt":
            said.uvs.append(words[1:3])
        elif key == b"vn":
            said.normals.append(words[1:4])
        elif key == b"f":
            said.num_triangles += max(len(words) - 3, 0)
            limits.check("triangles", said.num_triangles, "max_faces")
            _add_face(said, words[1:], said.corners[material])
        elif key == b"usemtl":
            material = line.split(None, 1)[1].strip().decode("utf-8", "replace") if len(words) > 1 else ""
        elif key == b"mtllib" and len(words) > 1:
            said.libraries.append(line.split(None, 1)[1].strip().decode("utf-8", "replace"))
        elif key in (b"p", b"l"):
            said.num_other += 1
    return said


def _add_face(said: _Statements, words: list[bytes], corners: list[tuple[int, int, int]]) -> None:
    """Append the triangles of one polygon as (vertex, uv, normal) rows; -1 where a corner has none."""
    counts = (len(said.vertices), len(said.uvs), len(said.normals))
    polygon = []
    for word in words:
        row = [-1, -1, -1]
        for slot, text in enumerate(word.split(b"/")[:3]):
            if text:
                index = int(text)
                row[slot] = index - 1 if index > 0 else counts[slot] + index
                if index == 0 or row[slot] < 0:
                    raise InputError(f"face corner {word.decode('latin-1')!r} refers to nothing")
        polygon.append((row[0], row[1], row[2]))
    for second, third in pairwise(polygon[1:]):
        corners += (polygon[0], second, third)


def _number_array(rows: list[list[bytes]], width: int) -> np.ndarray:
    """float64 [n, width]; a missing value is 0."""
    padded = [row if len(row) == width else (row + [b"0"] * width)[:width] for row in rows]
    return (
        np.array(padded, dtype="S32").astype(np.float64).reshape(-1, width) if rows else np.zeros((0, width))
    )


def _vertex_array(rows: list[list[bytes]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions [P, 3], and the colours [P, 4] of the common extension ``v x y z r g b``, made linear."""
    positions = _number_array([row[:3] for row in rows], 3)
    if not rows or any(len(row) not in (6, 7) for row in (rows[0], rows[-1])):
        return positions, None
    encoded = np.clip(_number_array([row[3:6] for row in rows], 3), 0, 1)
    return positions, np.concatenate([decode_srgb(encoded), np.ones((len(rows), 1))], 1).astype(np.float32)


def _part(
    corners: np.ndarray,
    vertices: np.ndarray,
    colors: np.ndarray | None,
    uvs: np.ndarray,
    normals: np.ndarray,
    material: Material,
) -> Part:
    """Weld equal corners [3F, 3] into vertices. Corners without a UV read (0, 0); without a normal, flat."""
    for slot, (what, array) in enumerate((("vertex", vertices), ("texture", uvs), ("normal", normals))):
        if int(corners[:, slot].max()) >= len(array):
            raise InputError(f"a face refers to {what} {int(corners[:, slot].max()) + 1} of {len(array)}")
    rows, index = np.unique(corners, axis=0, return_inverse=True)
    has_uv, has_normal = rows[:, 1] >= 0, rows[:, 2] >= 0
    part_uvs = part_normals = None
    if has_uv.any() and material.base_color_texture is not None:
        part_uvs = np.where(has_uv[:, None], uvs[rows[:, 1]], 0)
        part_uvs = np.stack([part_uvs[:, 0], 1 - part_uvs[:, 1]], 1).astype(np.float32)  # OBJ's v points up
    if has_normal.any():
        part_normals = np.where(has_normal[:, None], normals[rows[:, 2]], 0)
    return Part(
        positions=vertices[rows[:, 0]],
        faces=index.reshape(-1, 3),
        material=material,
        normals=part_normals,
        uvs=part_uvs,
        colors=None if colors is None else colors[rows[:, 0]],
    )


def _read_mtl(text: bytes, resolve: Resolver, budget: TextureBudget) -> dict[str, Material]:
    blocks: dict[str, dict[str, list[str]]] = {}
    block: dict[str, list[str]] = {}
    for line in text.decode("utf-8", "replace").splitlines():
        words = line.split()
        if len(words) < 2:
            continue
        if words[0] == "newmtl":
            block = blocks.setdefault(line.split(None, 1)[1].strip(), {})
        else:
            block[words[0].lower()] = line.split(None, 1)[1].split()
    return {name: _material(name, block, resolve, budget) for name, block in blocks.items()}


def _material(name: str, block: dict[str, list[str]], resolve: Resolver, budget: TextureBudget) -> Material:
    texture = None
    if "map_kd" in block:
        path = _map_path(block["map_kd"])
        texture = Texture(budget.decode(resolve(path), path))
    r, g, b = (float(x) for x in (block.get("kd", ["0.8"] * 3) * 3)[:3])
    if texture is not None:
        r = g = b = 1.0  # importers show the texture in place of Kd, which many exporters leave black
    alpha = float(block["d"][-1]) if "d" in block else 1 - float(block.get("tr", ["0"])[0])
    e = [float(x) for x in (block.get("ke", ["0"] * 3) * 3)[:3]]
    return Material(
        name=name,
        base_color_factor=(r, g, b, alpha),
        base_color_texture=texture,
        emissive_factor=(e[0], e[1], e[2]),
        alpha_mode="BLEND" if alpha < 1 else "OPAQUE",
        double_sided=True,
    )


def _map_path(words: list[str]) -> str:
    """The file name of a map statement, which may hold spaces, after its options."""
    while len(words) > 1 and words[0].lower() in _MAP_OPTIONS:
        count = _MAP_OPTIONS[words[0].lower()]
        words = words[1:]
        while count and len(words) > 1 and (count == 1 or _is_number(words[0])):
            words, count = words[1:], count - 1
    return " ".join(words)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
