"""Wavefront OBJ, in file coordinates; its materials are read by :mod:`diff2to3.assets.mtl`.

Read here because no library that may be used reads what exporters write: tinyobjloader and assimp lose a first
line behind a byte order mark, refuse a comment after a face, and take ``Tr 1`` for invisible; trimesh drops texture
coordinates where faces with and without them mix. Smoothing groups, curves, points and lines are ignored.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from diff2to3.assets.images import TextureBudget
from diff2to3.assets.limits import Limits
from diff2to3.assets.mtl import MaterialLibrary, Surface, are_bytes, find_name, name_of
from diff2to3.assets.parts import NO_MATERIAL, Part, decode_srgb
from diff2to3.assets.polygons import triangulate
from diff2to3.assets.source import Resolver
from diff2to3.errors import InputError
from diff2to3.files import utf8
from diff2to3.types import Material

#: A comment in a line of numbers; Windows writes "1.#QNAN".
_NUMBER_COMMENT = re.compile(rb"(?<!\.)#.*")
#: Several libraries in one statement, whose names may hold spaces.
_LIBRARY_END = re.compile(r"(?<=\.mtl)\s+", re.IGNORECASE)

Row = tuple[int, int, int]


@dataclass
class _Faces:
    """Polygons of one material: (vertex, uv, normal) of each corner, -1 where it has none, and their sizes."""

    corners: list[Row] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


@dataclass
class _Statements:
    """What an OBJ says, before anything is put together. Indices count from 0."""

    vertices: list[list[bytes]] = field(default_factory=list)
    uvs: list[list[bytes]] = field(default_factory=list)
    normals: list[list[bytes]] = field(default_factory=list)
    faces: dict[bytes, _Faces] = field(default_factory=lambda: defaultdict(_Faces))
    libraries: list[bytes] = field(default_factory=list)
    num_triangles: int = 0


def read_obj(data: bytes, resolve: Resolver, limits: Limits) -> tuple[list[Part], list[str]]:
    """One part a material, and notes. InputError for what cannot be drawn; see :func:`load_mesh`."""
    said = _parse(utf8(data), limits)
    if said.num_triangles == 0:
        what = "a point cloud or wireframe, not a surface" if said.vertices else "an empty file"
        raise InputError(f"no triangles: {what}")
    notes: list[str] = []
    library = MaterialLibrary(resolve, TextureBudget(limits), notes)
    for line in said.libraries:
        _read_library(line, resolve, library, notes)
    vertices, colors = _vertex_array(said.vertices, notes)
    arrays = (vertices, _number_array(said.uvs, 2), _number_array(said.normals, 3))
    plain = NO_MATERIAL if colors is None else (1.0, 1.0, 1.0, 1.0)
    parts = []
    for key, faces in said.faces.items():
        if not faces.sizes:
            continue
        found = library.surface(key)
        if found is None:
            found = Surface(Material(name_of(key), plain, double_sided=True))
            if key and said.libraries:
                notes.append(f"material {name_of(key)!r} is in no material file, drawn grey")
        parts.append(_part(faces, arrays, colors, found, notes))
    return parts, notes + library.budget.notes


def _parse(data: bytes, limits: Limits) -> _Statements:
    said = _Statements()
    faces = said.faces[b""]
    known: dict[bytes, Row] = {}
    for line in data.replace(b"\\\r\n", b" ").replace(b"\\\n", b" ").splitlines():
        words = line.split()
        if not words:
            continue
        key = words[0]
        if b"#" in line and key in (b"v", b"vt", b"vn", b"f"):
            words = _NUMBER_COMMENT.sub(b"", line).split()
        if key == b"v":
            said.vertices.append(words[1:])
        elif key == b"vt":
            said.uvs.append(words[1:3])
        elif key == b"vn":
            said.normals.append(words[1:4])
        elif key == b"f" and len(words) > 3:
            said.num_triangles += len(words) - 3
            limits.check("triangles", said.num_triangles, "max_faces")
            for word in words[1:]:
                row = known.get(word)
                faces.corners.append(_corner(word, said, known) if row is None else row)
            faces.sizes.append(len(words) - 1)
        elif key == b"usemtl":
            faces = said.faces[_rest(line)]
        elif key == b"mtllib" and len(words) > 1:
            said.libraries.append(_rest(line))
    return said


def _rest(line: bytes) -> bytes:
    return b"".join(line.split(None, 1)[1:]).strip()


def _corner(word: bytes, said: _Statements, known: dict[bytes, Row]) -> Row:
    """(vertex, uv, normal) of a face's corner. Kept in ``known`` unless it counts from the end."""
    counts = (len(said.vertices), len(said.uvs), len(said.normals))
    row, relative = [-1, -1, -1], False
    for slot, text in enumerate(word.split(b"/")[:3]):
        if not text:
            continue
        try:
            index = int(text)
        except ValueError:
            shown = word.decode("latin-1")
            raise InputError(f"damaged: a face's corner is {shown!r}, not whole numbers with /") from None
        row[slot] = index - 1 if index > 0 else counts[slot] + index
        relative |= index < 0
        if slot == 0 and (index == 0 or row[slot] < 0):
            raise InputError(f"face corner {word.decode('latin-1')!r} refers to nothing")
        row[slot] = max(row[slot], -1)
    found = (row[0], row[1], row[2])
    if not relative:
        known[word] = found
    return found


def _read_library(line: bytes, resolve: Resolver, library: MaterialLibrary, notes: list[str]) -> None:
    """One ``mtllib`` statement: a file whose name may hold spaces, or several files."""
    found = find_name(line, resolve)
    if found is not None:
        library.add(found[1], posixpath.dirname(found[0]))
        return
    text = name_of(line).split(" #")[0].strip()
    for name in _LIBRARY_END.split(text) if _LIBRARY_END.search(text) else text.split():
        try:
            path, data = resolve.find(name)
        except InputError as error:  # many exporters name a file that they never wrote
            notes.append(f"material file not found, drawn grey: {error}")
            continue
        library.add(data, posixpath.dirname(path))


def _number_array(rows: list[list[bytes]], width: int) -> np.ndarray:
    """float64 [n, width]; a missing value is 0."""
    padded = [row if len(row) == width else (row + [b"0"] * width)[:width] for row in rows]
    try:
        return np.array(list(map(float, chain.from_iterable(padded)))).reshape(-1, width)
    except ValueError as error:
        raise InputError(f"damaged: a coordinate is no number ({error})") from None


def _vertex_array(rows: list[list[bytes]], notes: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions [P, 3], and the colours [P, 4] of the common extension ``v x y z r g b``, made linear.

    The extension has colours in [0, 1]; where one is above 1 they count as bytes. Vertices without are white.
    """
    positions = _number_array([row[:3] for row in rows], 3)
    if not any(len(row) in (6, 7) for row in rows):
        return positions, None
    white = [b"1", b"1", b"1"]
    encoded = _number_array([row[3:6] if len(row) in (6, 7) else white for row in rows], 3)
    if are_bytes(encoded):
        given = np.array([len(row) in (6, 7) for row in rows])
        encoded[given] /= 255
        notes.append("vertex colours above 1 are read as 0 to 255")
    linear = decode_srgb(np.clip(encoded, 0, 1))
    return positions, np.concatenate([linear, np.ones((len(rows), 1))], 1).astype(np.float32)


def _part(
    faces: _Faces,
    arrays: Sequence[np.ndarray],
    colors: np.ndarray | None,
    found: Surface,
    notes: list[str],
) -> Part:
    """Cut polygons into triangles and weld equal corners into vertices.

    ``arrays`` are positions, texture coordinates and normals. Corners without a UV read (0, 0); without a normal,
    flat. An index of a UV or normal that is not there counts as none.
    """
    material = found.material
    corners = np.array(faces.corners, np.int64)
    if int(corners[:, 0].max()) >= len(arrays[0]):
        raise InputError(f"a face refers to vertex {int(corners[:, 0].max()) + 1} of {len(arrays[0])}")
    for slot, what in ((1, "texture coordinates"), (2, "normals")):
        missing = corners[:, slot] >= len(arrays[slot])
        if missing.any():
            highest = int(corners[:, slot].max()) + 1
            notes.append(f"a face refers to {what} {highest} of {len(arrays[slot])}: left out")
            corners[missing, slot] = -1
    vertices, uvs, normals = arrays
    triangles, _, num_fans = triangulate(vertices[corners[:, 0]], np.array(faces.sizes, np.int64))
    if num_fans:
        notes.append(f"{num_fans} polygons that are not convex have too many corners and are drawn as fans")
    rows, index = np.unique(corners[triangles.reshape(-1)], axis=0, return_inverse=True)
    has_uv, has_normal = rows[:, 1] >= 0, rows[:, 2] >= 0
    part_uvs = emissive_uvs = part_normals = None
    if material.base_color_texture is not None or material.emissive_texture is not None:
        if has_uv.any():
            corner_uvs = np.where(has_uv[:, None], uvs[rows[:, 1]], 0)
            part_uvs = found.where.apply(corner_uvs)
            if material.emissive_texture is not None and found.emissive_where != found.where:
                emissive_uvs = found.emissive_where.apply(corner_uvs)
        else:
            notes.append(f"material {material.name!r} has a texture and its faces no texture coordinates")
    if has_normal.any():
        part_normals = np.where(has_normal[:, None], normals[rows[:, 2]], 0)
    return Part(
        positions=vertices[rows[:, 0]],
        faces=index.reshape(-1, 3),
        material=material,
        normals=part_normals,
        uvs=part_uvs,
        colors=None if colors is None else colors[rows[:, 0]],
        emissive_uvs=emissive_uvs,
    )
